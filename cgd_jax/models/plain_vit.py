"""Plain vision transformers (Dosovitskiy et al., https://arxiv.org/abs/2010.11929).

As Hugging Face publishes those of Google, trained on ImageNet-21k or as in "How to train your ViT?"
(https://arxiv.org/abs/2106.10270), and DINO's (Caron et al., https://arxiv.org/abs/2104.14294):
the same network, with 1e-12 in LayerNorms where timm has 1e-6. The pixels' mean and deviation
differ; the preprocessor_config.json beside the weights has them. The pooler behind the class token
is left out.
"""

from functools import partial

from cgd_jax.models.family import HuggingFace, Scheme
from cgd_jax.models.vit import SIZES, TIMM, ViT, ViTFamily, from_hugging_face, size_and_grid_of
from cgd_jax.preprocess import Normalization

BACKBONES = {
    f"vit_{size}_patch{patch}_{image}": partial(
        ViT, published_patch=patch, grid=image // patch, epsilon=1e-12, **SIZES[size]
    )
    for size, patch, images in (
        ("tiny", 16, (224,)),
        ("small", 8, (224,)),
        ("small", 16, (224,)),
        ("base", 8, (224,)),
        ("base", 16, (224, 384)),
        ("base", 32, (224, 384)),
        ("large", 16, (224, 384)),
        ("large", 32, (384,)),
    )
    for image in images
}


_COMPUTED = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True}
FAMILY = ViTFamily(
    title="ViT",
    members=BACKBONES,
    schemes=(
        Scheme("timm ViT", "blocks.0.attn.qkv.weight", "head.", TIMM),
        Scheme(
            "Hugging Face ViT",
            "embeddings.patch_embeddings.projection.weight",
            ("classifier.", "pooler."),
            TIMM,
            from_hugging_face,
        ),
    ),
    normalization=Normalization.of(0.5, 0.5),
    hugging_face={"vit": HuggingFace(_COMPUTED, size_and_grid_of)},
)
