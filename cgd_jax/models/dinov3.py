"""The vision transformers of DINOv3 (Siméoni et al., https://arxiv.org/abs/2508.10104).

Queries and keys are rotated by the places of their patches, so that any size of images goes in as
it is. Keys have no bias. The weights are published under a licence that has to be accepted; a file
of Hugging Face, timm or Meta can be loaded.
"""

from collections.abc import Mapping
from functools import partial

import numpy as np

from cgd_jax.models.family import HuggingFace, Scheme, rename
from cgd_jax.models.vit import SIZES, TIMM, ViT, ViTFamily, from_hugging_face, size_of
from cgd_jax.preprocess import IMAGENET

BACKBONES = {
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
FAMILY = ViTFamily(
    title="DINOv3",
    members=BACKBONES,
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
