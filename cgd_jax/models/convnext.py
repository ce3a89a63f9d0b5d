"""ConvNeXt and ConvNeXt V2 that end in a feature map: no global pooling, no classifier.

ConvNeXt (Liu et al., https://arxiv.org/abs/2201.03545) and V2 (Woo et al.,
https://arxiv.org/abs/2301.00808), which has a global response normalization in the place of the
layer scale. The LayerNorm behind the global pooling belongs to the classifier.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cgd_jax.models.family import OPTIONS, Family, HuggingFace, Scheme
from cgd_jax.models.layers import Dense, LayerNorm, LayerScale, StagedNet, drop_path, small
from cgd_jax.preprocess import IMAGENET


class GlobalResponseNorm(nn.Module):
    """Rescales channels by their length over all positions, among that of all channels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight, bias = (
            self.param(name, nn.initializers.zeros, x.shape[-1:]) for name in ("weight", "bias")
        )
        squared = jnp.sum(x.astype(jnp.float32) ** 2, (1, 2), keepdims=True)
        # A channel that is 0 everywhere has length 0, and a gradient of 0.
        length = jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)
        share = length / (length.mean(-1, keepdims=True) + 1e-6)
        return x * (1 + weight * share).astype(x.dtype) + bias.astype(x.dtype)


class Block(nn.Module):
    """7×7 depthwise convolution, LayerNorm, two linear layers; the input is added."""

    v2: bool
    drop_path: float
    train: bool
    conv: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        depthwise = {"padding": 3, "feature_group_count": channels}
        y = self.conv(channels, (7, 7), **depthwise, name="conv_dw")(x)
        y = LayerNorm(dtype=x.dtype, name="norm")(y)
        y = Dense(4 * channels, dtype=x.dtype, name="fc1")(y)
        y = nn.gelu(y, approximate=False)
        if self.v2:
            y = GlobalResponseNorm(name="grn")(y)
        y = Dense(channels, dtype=x.dtype, name="fc2")(y)
        if not self.v2:
            y = LayerScale(1e-6, name="scale")(y)
        return x + drop_path(y, self.drop_path, self.train, "drop_path")


class ConvNeXt(StagedNet):
    """images [B, H, W, 3] → feature map [B, H/s, W/s, C], s = 32, or 16 with `last_stride=1`."""

    widths: tuple[int, ...]  # their channels
    v2: bool = False
    patch_size: int = 0  # side and stride of the first convolution in pixels; 0: 4, as published

    STEM = ("stem_conv", "stem_norm")
    DOWNSAMPLE = ("norm", "conv")

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv = partial(self.conv, kernel_init=small, dtype=self.dtype)
        norm = partial(LayerNorm, dtype=self.dtype)
        side = self.patch_size or 4
        x = conv(self.widths[0], (side, side), side, padding="VALID", name="stem_conv")(x)
        x = norm(name="stem_norm")(x)
        strides = self.strides([1] + [2] * (len(self.depths) - 1))
        for name, own in self.blocks.items():
            stage, block = map(int, name.removeprefix("stages").split("_"))
            if stage and not block:
                # With stride 1 the last row and column have no neighbour: they see zeros there.
                padding = "VALID" if strides[stage] == 2 else ((0, 1), (0, 1))
                x = norm(name=f"downsample{stage}_norm")(x)
                downsample = partial(conv, padding=padding, name=f"downsample{stage}_conv")
                x = downsample(self.widths[stage], (2, 2), strides[stage])(x)
            x = self.run_block(Block, name, x, **own, v2=self.v2, train=train, conv=conv)
        return x


_TIMM = {
    "^stem_conv": "stem.0",
    "^stem_norm": "stem.1",
    r"^downsample(\d)_norm": r"stages.\1.downsample.0",
    r"^downsample(\d)_conv": r"stages.\1.downsample.1",
    r"^stages(\d)_": r"stages.\1.blocks.",
    r"\.(fc\d|grn)$": r".mlp.\1",
    r"\.scale$": "",
}
_HUGGING_FACE = {
    "^stem_conv": "embeddings.patch_embeddings",
    "^stem_norm": "embeddings.layernorm",
    r"^downsample(\d)_norm": r"encoder.stages.\1.downsampling_layer.0",
    r"^downsample(\d)_conv": r"encoder.stages.\1.downsampling_layer.1",
    r"^stages(\d)_": r"encoder.stages.\1.layers.",
    r"\.conv_dw$": ".dwconv",
    r"\.norm$": ".layernorm",
    r"\.fc(\d)$": r".pwconv\1",
    r"\.scale$": "",
}


def _from_hugging_face(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Calls the layer scale as timm does, and takes the axes of length 1 from V2's tensors."""
    return {
        name.replace("layer_scale_parameter", "gamma"): a.ravel() if ".grn." in name else a
        for name, a in arrays.items()
    }


SIZES: dict[str, dict[str, Any]] = {
    "atto": {"depths": (2, 2, 6, 2), "widths": (40, 80, 160, 320)},
    "nano": {"depths": (2, 2, 8, 2), "widths": (80, 160, 320, 640)},
    "tiny": {"depths": (3, 3, 9, 3), "widths": (96, 192, 384, 768)},
    "small": {"depths": (3, 3, 27, 3), "widths": (96, 192, 384, 768)},
    "base": {"depths": (3, 3, 27, 3), "widths": (128, 256, 512, 1024)},
    "large": {"depths": (3, 3, 27, 3), "widths": (192, 384, 768, 1536)},
}
BACKBONES = {
    f"convnext{version}_{size}": partial(ConvNeXt, v2=bool(version), **sizes)
    for version in ("", "v2")
    for size, sizes in SIZES.items()
    if version or size not in ("atto", "nano")
    if (version, size) != ("v2", "small")
}


def _options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "v2": config["model_type"] == "convnextv2",
        "depths": tuple(config.get("depths", SIZES["tiny"]["depths"])),
        "widths": tuple(config.get("hidden_sizes", SIZES["tiny"]["widths"])),
    }


# Its layer_norm_eps is that of the norm behind the global pooling only.
_DESCRIBED = HuggingFace({"patch_size": 4, "hidden_act": "gelu"}, _options_of)
FAMILY = Family(
    title="ConvNeXt",
    members=BACKBONES,
    schemes=(
        Scheme(
            "timm ConvNeXt", "stages.0.blocks.0.conv_dw.weight", ("head.norm.", "head.fc."), _TIMM
        ),
        Scheme(
            "Hugging Face ConvNeXt",
            "encoder.stages.0.layers.0.dwconv.weight",
            ("layernorm.", "classifier."),
            _HUGGING_FACE,
            _from_hugging_face,
        ),
    ),
    normalization=IMAGENET,
    options=OPTIONS | {"patch_size": 0, "drop_path": 0.0},
    batch_norm=False,
    timm={name: name for name in BACKBONES},
    hugging_face=dict.fromkeys(("convnext", "convnextv2"), _DESCRIBED),
)
