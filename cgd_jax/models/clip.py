"""The image towers of CLIP and SigLIP.

CLIP (Radford et al., https://arxiv.org/abs/2103.00020) as published by OpenAI, with its
activation "quick GELU"; SigLIP and SigLIP 2 (Zhai et al., https://arxiv.org/abs/2303.15343;
Tschannen et al., https://arxiv.org/abs/2502.14786) of a fixed size, whose tower has no class token
but a query of its own, which pools the patches. Every token goes through the last LayerNorm, as in
timm and in the class token of Hugging Face. Of a file with both towers, the one for texts and the
projections into the common space are left out. Positions are interpolated as Hugging Face does.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from cgd_jax.models.family import Family, Scheme
from cgd_jax.models.vit import OPTIONS, ViT, fuse, rename, size_of, timm_name
from cgd_jax.preprocess import Normalization

__all__ = ["CLIP", "SIGLIP"]

SIZES: dict[str, dict[str, Any]] = {
    "base": {"width": 768, "depth": 12, "heads": 12},
    "large": {"width": 1024, "depth": 24, "heads": 16},
}
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
    for name, dimensions in (("pos_embed", 2), ("cls_token", 1)):
        if name in arrays and arrays[name].ndim == dimensions:
            arrays[name] = arrays[name].reshape(1, -1, arrays[name].shape[-1])
    for leaf in ("weight", "bias"):  # of queries, keys and values in one
        joined = arrays.pop(f"attn_pool.attention.in_proj_{leaf}", None)
        if joined is not None:
            width = len(joined) // 3
            arrays[f"attn_pool.q.{leaf}"] = joined[:width]
            arrays[f"attn_pool.kv.{leaf}"] = joined[width:]
    return arrays


def _vision_config(config: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    """Returns the part of a Hugging Face config that is of the image tower, if it is of `kind`."""
    if config.get("model_type") == kind:
        return config.get("vision_config", {})
    return config if config.get("model_type") == f"{kind}_vision_model" else None


def _published_clip(config: Mapping[str, Any]) -> str | None:
    timm = re.fullmatch(
        r"vit_(\w+)_patch(\d+)_clip_quickgelu_(\d+)", config.get("architecture", "")
    )
    vision = _vision_config(config, "clip")
    if timm:
        name = f"clip_{timm[1]}_patch{timm[2]}_{timm[3]}"
    elif vision is not None and vision.get("hidden_act", "quick_gelu") == "quick_gelu":
        patch, image = vision.get("patch_size", 32), vision.get("image_size", 224)
        name = f"clip_{size_of(vision, SIZES)}_patch{patch}_{image}"
    else:
        return None
    return name if name in CLIP_BACKBONES else None


def _published_siglip(config: Mapping[str, Any]) -> str | None:
    timm = re.fullmatch(r"vit_(\w+)_patch16_siglip_(\d+)", config.get("architecture", ""))
    vision = _vision_config(config, "siglip")
    if timm:
        name = f"siglip_{timm[1]}_patch16_{timm[2]}"
    elif vision is not None:
        patch, image = vision.get("patch_size", 16), vision.get("image_size", 224)
        name = f"siglip_{size_of(vision, SIZES)}_patch{patch}_{image}"
    else:
        return None
    return name if name in SIGLIP_BACKBONES else None


CLIP = Family(
    title="CLIP",
    members=CLIP_BACKBONES,
    schemes=(
        Scheme("timm CLIP", "norm_pre.weight", "head", timm_name),
        Scheme(
            "Hugging Face CLIP", "embeddings.class_embedding", (), timm_name, _from_hugging_face
        ),
    ),
    normalization=Normalization.of(
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    ),
    options=OPTIONS,
    downsamples=False,
    batch_norm=False,
    class_token=True,
    published=_published_clip,
)
SIGLIP = CLIP._replace(
    title="SigLIP",
    members=SIGLIP_BACKBONES,
    schemes=(
        Scheme("timm SigLIP", "attn_pool.latent", "head", timm_name),
        Scheme("Hugging Face SigLIP", "head.probe", (), timm_name, _from_hugging_face),
    ),
    normalization=Normalization.of(0.5, 0.5),
    published=_published_siglip,
)
