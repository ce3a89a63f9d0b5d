"""The vision transformers of DINOv2, with registers and without, and of DINOv3.

DINOv2 (Oquab et al., https://arxiv.org/abs/2304.07193) interpolates positions as Hugging Face does:
without smoothing, but with it where there are registers (Darcet et al.,
https://arxiv.org/abs/2309.16588). The classifiers that are published beside the networks are left
out.

DINOv3 (Siméoni et al., https://arxiv.org/abs/2508.10104) rotates queries and keys by the places of
their patches, so that any size of images goes in as it is. Keys have no bias. The weights are
published under a licence that has to be accepted; a file of Hugging Face, timm or Meta will do.
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
DINOV2_BACKBONES = {
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


def _described(registers: int) -> HuggingFace:
    computed = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "use_swiglu_ffn": False}
    return HuggingFace(computed, lambda config: size_of(config) | {"registers": registers})


DINOV2 = ViTFamily(
    title="DINOv2",
    members=DINOV2_BACKBONES,
    schemes=(
        Scheme("timm or Meta DINOv2", "blocks.0.ls1.gamma", "head.", TIMM, _without_mask),
        Scheme(
            "Hugging Face DINOv2",
            "embeddings.patch_embeddings.projection.weight",
            "classifier.",
            TIMM,
            lambda arrays: _without_mask(from_hugging_face(arrays)),
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

DINOV3_BACKBONES = {
    f"dinov3_{size}": partial(
        ViT, grid=0, registers=4, layer_scale=True, key_bias=False, epsilon=1e-5, **sizes
    )
    for size, sizes in SIZES.items()
}


def _from_timm(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds the biases that timm leaves out where all of them are 0."""
    arrays = rename(arrays, {r"gamma_(\d)$": r"ls\1.gamma"})
    for name, weight in list(arrays.items()):
        if name.endswith("attn.qkv.weight"):
            for bias in ("q_bias", "v_bias"):
                zeros = np.zeros(weight.shape[-1], np.float32)
                arrays.setdefault(name.replace("qkv.weight", bias), zeros)
    return arrays


_to_timm = partial(rename, rules={r"ls(\d)\.gamma$": r"gamma_\1"})


def _from_meta(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    rules = {
        r"^(mask_token|rope_embed\.|local_cls_norm\.)|\.bias_mask$": None,
        "^storage_tokens$": "reg_token",
    }
    arrays = rename(arrays, rules)
    for name in [name for name in arrays if name.endswith("attn.qkv.bias")]:
        attention, bias = name.removesuffix("qkv.bias"), arrays.pop(name)
        arrays[f"{attention}q_bias"], _, arrays[f"{attention}v_bias"] = np.split(bias, 3)
    return arrays


_OF_HUGGING_FACE = {
    r"attention\.([qv])_proj\.bias": r"attn.\1_bias",
    r"^embeddings\.register_tokens": "reg_token",
    r"mlp\.up_proj": "mlp.fc1",
    r"mlp\.down_proj": "mlp.fc2",
}
_COMPUTED = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "rope_theta": 100.0}
_COMPUTED |= {"use_gated_mlp": False, "key_bias": False}
DINOV3 = ViTFamily(
    title="DINOv3",
    members=DINOV3_BACKBONES,
    schemes=(
        Scheme("timm DINOv3", "blocks.0.gamma_1", "head.", TIMM, _from_timm, _to_timm),
        Scheme("Meta DINOv3", "storage_tokens", "head.", TIMM, _from_meta),
        Scheme(
            "Hugging Face DINOv3",
            "embeddings.patch_embeddings.weight",
            (),
            TIMM,
            partial(from_hugging_face, more=_OF_HUGGING_FACE),
        ),
    ),
    normalization=IMAGENET,
    timm={
        f"vit_{size}_patch16_dinov3{suffix}": f"dinov3_{size}"
        for size in SIZES
        for suffix in ("", "_qkvb")
    },
    hugging_face={"dinov3_vit": HuggingFace(_COMPUTED, partial(size_of, default="small"))},
)
