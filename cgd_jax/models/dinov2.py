"""DINOv2 (Oquab et al., https://arxiv.org/abs/2304.07193), with registers and without.

The registers are those of Darcet et al., https://arxiv.org/abs/2309.16588. Positions are
interpolated as Hugging Face does: without smoothing, but with it where there are registers. The
classifiers that are published beside the networks are left out.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from cgd_jax.models.family import HuggingFace, Scheme, rename
from cgd_jax.models.vit import SIZES, TIMM, ViT, ViTFamily, from_hugging_face, size_of
from cgd_jax.preprocess import IMAGENET

_registers: dict[str, Any] = {"registers": 4, "class_position": False, "antialias": True}
BACKBONES = {
    f"dinov2_{size}{suffix}": partial(
        ViT, published_patch=14, grid=37, layer_scale=True, **SIZES[size], **variant
    )
    for suffix, variant in {"": {}, "_reg": _registers}.items()
    for size in ("small", "base", "large")
}


def _without_mask(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Brings the files of Meta, in whose names timm's are written, to those of timm."""
    arrays = rename(arrays, {"^mask_token$": None, "^register_tokens$": "reg_token"})
    if {"reg_token", "cls_token", "pos_embed"} <= arrays.keys():
        count = arrays["pos_embed"].shape[1]
        if math.isqrt(count) ** 2 != count:  # the class token's position, which timm adds to it
            arrays["cls_token"] = arrays["cls_token"] + arrays["pos_embed"][:, :1]
            arrays["pos_embed"] = arrays["pos_embed"][:, 1:]
    return arrays


def _from_hugging_face(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return _without_mask(from_hugging_face(arrays))


def _described(registers: int) -> HuggingFace:
    computed = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "use_swiglu_ffn": False}
    return HuggingFace(computed, lambda config: size_of(config) | {"registers": registers})


FAMILY = ViTFamily(
    title="DINOv2",
    members=BACKBONES,
    schemes=(
        Scheme("timm or Meta DINOv2", "blocks.0.ls1.gamma", "head.", TIMM, _without_mask),
        Scheme(
            "Hugging Face DINOv2",
            "embeddings.patch_embeddings.projection.weight",
            "classifier.",
            TIMM,
            _from_hugging_face,
        ),
    ),
    normalization=IMAGENET,
    timm={
        f"vit_{size}_patch14{theirs}_dinov2": f"dinov2_{size}{ours}"
        for theirs, ours in {"": "", "_reg4": "_reg"}.items()
        for size in ("small", "base", "large")
    },
    hugging_face={"dinov2": _described(0), "dinov2_with_registers": _described(4)},
)
