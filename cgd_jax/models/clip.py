"""The image towers of CLIP and SigLIP.

CLIP (Radford et al., https://arxiv.org/abs/2103.00020) as published by OpenAI, with its
activation "quick GELU"; SigLIP and SigLIP 2 (Zhai et al., https://arxiv.org/abs/2303.15343;
Tschannen et al., https://arxiv.org/abs/2502.14786) of a fixed size, whose tower has no class token
but a query of its own, which pools the patches. Every token goes through the last LayerNorm, as in
timm and in the class token of Hugging Face. Of a file with both towers, the one for texts and the
projections into the common space are left out. Positions are interpolated as Hugging Face does.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from cgd_jax.models.family import HuggingFace, Scheme, rename
from cgd_jax.models.vit import SIZES, TIMM, ViT, ViTFamily, fuse, size_and_grid_of
from cgd_jax.preprocess import Normalization

_clip = partial(ViT, patch_bias=False, norm_pre=True, activation="quick_gelu", epsilon=1e-5)
_siglip = partial(ViT, class_token=False, activation="gelu_tanh")
# Size, pixels of a patch, pixels of an image; what is common stands in the name nowhere else.
CLIP_BACKBONES = {
    f"clip_{size}_patch{patch}_{image}": partial(
        _clip, published_patch=patch, grid=image // patch, **SIZES[size]
    )
    for size, patch, image in (
        ("base", 32, 224),
        ("base", 16, 224),
        ("large", 14, 224),
        ("large", 14, 336),
    )
}
SIGLIP_BACKBONES = {
    f"siglip_{size}_patch16_{image}": partial(_siglip, grid=image // 16, **SIZES[size])
    for size, images in (("base", (224, 256, 384, 512)), ("large", (256, 384, 512)))
    for image in images
}


def _from_hugging_face(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    parts = tuple(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj"))
    rules = {
        r"^(text_model|text_projection|visual_projection|logit_|embeddings\.position_ids)": None,
        r"^embeddings\.patch_embedding\.": "patch_embed.proj.",
        r"^embeddings\.position_embedding\.weight": "pos_embed",
        r"^embeddings\.class_embedding": "cls_token",
        r"^encoder\.layers\.": "blocks.",
        r"self_attn\.out_proj": "attn.proj",
        r"layer_norm(\d)": r"norm\1",
        r"^pre_layrnorm": "norm_pre",
        r"^post_layernorm": "norm",
        r"^head\.probe": "attn_pool.latent",
        r"^head\.attention\.out_proj": "attn_pool.proj",
        r"^head\.layernorm": "attn_pool.norm",
        r"^head\.": "attn_pool.",
    }
    arrays = rename(fuse(arrays, parts, "attn.qkv"), rules)
    for name in arrays.keys() & {"pos_embed", "cls_token"}:
        arrays[name] = arrays[name].reshape(1, -1, arrays[name].shape[-1])
    for leaf in ("weight", "bias"):  # of queries, keys and values in one
        joined = arrays.pop(f"attn_pool.attention.in_proj_{leaf}", None)
        if joined is not None:
            query, *key_value = np.split(joined, 3)
            arrays[f"attn_pool.q.{leaf}"] = query
            arrays[f"attn_pool.kv.{leaf}"] = np.concatenate(key_value)
    return arrays


def _described(kind: str, patch: int, computed: Mapping[str, Any]) -> dict[str, HuggingFace]:
    """Of both towers, and of the one for images; `patch` pixels where a config has none."""
    described = HuggingFace(computed, partial(size_and_grid_of, patch=patch))
    return dict.fromkeys((kind, f"{kind}_vision_model"), described)


CLIP = ViTFamily(
    title="CLIP",
    members=CLIP_BACKBONES,
    schemes=(
        Scheme("timm CLIP", "norm_pre.weight", "head.", TIMM),
        Scheme("Hugging Face CLIP", "embeddings.class_embedding", (), TIMM, _from_hugging_face),
    ),
    normalization=Normalization.of(
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    ),
    timm={
        "vit_base_patch32_clip_quickgelu_224": "clip_base_patch32_224",
        "vit_base_patch16_clip_quickgelu_224": "clip_base_patch16_224",
        "vit_large_patch14_clip_quickgelu_224": "clip_large_patch14_224",
        "vit_large_patch14_clip_quickgelu_336": "clip_large_patch14_336",
    },
    hugging_face=_described("clip", 32, {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}),
)
SIGLIP = CLIP._replace(
    title="SigLIP",
    members=SIGLIP_BACKBONES,
    schemes=(
        Scheme("timm SigLIP", "attn_pool.latent", "head.", TIMM),
        Scheme("Hugging Face SigLIP", "head.probe", (), TIMM, _from_hugging_face),
    ),
    normalization=Normalization.of(0.5, 0.5),
    # The only one that timm computes with the approximate GELU of the training.
    timm={"vit_large_patch16_siglip_512": "siglip_large_patch16_512"},
    hugging_face=_described(
        "siglip",
        16,
        {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": True},
    ),
)
