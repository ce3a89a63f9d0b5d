"""BN-Inception that ends in a feature map: no global pooling, no classifier.

Ioffe & Szegedy, https://arxiv.org/abs/1502.03167, appendix, with the names under which Cadene's
`pretrainedmodels` publishes the ImageNet weights that papers on metric learning start from. They
come from Caffe: channels go in as blue, green, red, from 0 to 255 less a mean, and pooling
windows may reach over the lower and the right edge.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cgd_jax.models.family import Family, Scheme
from cgd_jax.models.layers import ConvNet, Layer
from cgd_jax.preprocess import Normalization

# Channels of the branches: 1×1 (0: none, and the block downsamples); 1×1 and 3×3; 1×1 and twice
# 3×3; 1×1 behind the pooling (0: none).
BLOCKS = {
    "3a": (64, (64, 64), (64, 96), 32),
    "3b": (64, (64, 96), (64, 96), 64),
    "3c": (0, (128, 160), (64, 96), 0),
    "4a": (224, (64, 96), (96, 128), 128),
    "4b": (192, (96, 128), (96, 128), 128),
    "4c": (160, (128, 160), (128, 160), 128),
    "4d": (96, (128, 192), (160, 192), 128),
    "4e": (0, (128, 192), (192, 256), 0),
    "5a": (352, (192, 320), (160, 224), 128),
    "5b": (352, (192, 320), (192, 224), 128),
}


def _over_the_edge(x: jax.Array) -> jax.Array:
    """Max-pooling 3×3 of stride 2, whose last windows may be cut off by the edge."""
    ends = [(0, max(0, 2 * -(-(side - 3) // 2) + 3 - side)) for side in x.shape[1:3]]
    return nn.max_pool(x, (3, 3), (2, 2), tuple(ends))


def _named(layer: Layer, x: jax.Array, channels: int, side: int, name: str, stride: int = 1):
    return layer(x, channels, side, (name, f"{name}_bn"), stride)


class Block(nn.Module):
    """Branches side by side on the same input, their outputs joined."""

    channels: tuple[int, tuple[int, int], tuple[int, int], int]
    stride: int
    maximum: bool  # whether it pools the maximum
    layer: Layer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = partial(_named, self.layer)
        alone, (reduced, out), (double_reduced, double_out), projected = self.channels
        outputs = [layer(x, alone, 1, "1x1")] if alone else []
        y = layer(x, reduced, 1, "3x3_reduce")
        outputs.append(layer(y, out, 3, "3x3", self.stride))
        y = layer(x, double_reduced, 1, "double_3x3_reduce")
        y = layer(y, double_out, 3, "double_3x3_1")
        outputs.append(layer(y, double_out, 3, "double_3x3_2", self.stride))
        if self.stride == 2:
            y = _over_the_edge(x)
        elif self.maximum:
            y = nn.max_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)))
        else:
            y = nn.avg_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)))
        outputs.append(layer(y, projected, 1, "pool_proj") if projected else y)
        return jnp.concatenate(outputs, -1)


class BNInception(ConvNet):
    """images [B, H, W, 3] → feature map [B, H/s, W/s, 1024], s = 32, or 16 with `last_stride=1`."""

    divisor: int = 1  # of all channels; more than 1 makes narrow networks

    STEM = tuple(
        f"{conv}{kind}"
        for conv in ("conv1_7x7_s2", "conv2_3x3_reduce", "conv2_3x3")
        for kind in ("", "_bn")
    )

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        strides = self.strides([1 if channels[0] else 2 for channels in BLOCKS.values()])
        return {
            f"inception_{name}": {
                "channels": self.scaled(channels),
                "stride": stride,
                # The mean is pooled, but where the map is made smaller, and in the end.
                "maximum": not channels[0] or name == "5b",
            }
            for (name, channels), stride in zip(BLOCKS.items(), strides, strict=True)
        }

    @nn.nowrap
    def scaled(self, channels: Any) -> Any:
        """Divides a number of channels, or all in a tuple."""
        return jax.tree.map(lambda n: n // self.divisor, channels)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        run = self.make_layer(train, use_bias=True)
        layer = lambda x, channels, *rest: _named(run, x, self.scaled(channels), *rest)
        x = layer(x[..., ::-1], 64, 7, "conv1_7x7_s2", 2)  # blue, green, red
        x = _over_the_edge(x)
        x = layer(layer(x, 64, 1, "conv2_3x3_reduce"), 192, 3, "conv2_3x3")
        x = _over_the_edge(x)
        return self.run_blocks(Block, x, layer=run)


def _flat_norms(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Some files, ported from Caffe, have [1, C] where BatchNorm has [C]."""
    return {name: a.ravel() if "_bn." in name else a for name, a in arrays.items()}


BACKBONES: dict[str, Callable[..., nn.Module]] = {"bninception": BNInception}
FAMILY = Family(
    title="BN-Inception",
    members=BACKBONES,
    schemes=(
        Scheme(
            "Cadene BN-Inception",
            "conv1_7x7_s2.weight",
            ("last_linear.", "fc."),
            {r"\.": "_"},
            _flat_norms,
        ),
    ),
    # Red, green, blue, of pixels from 0 to 1.
    normalization=Normalization.of((128 / 255, 117 / 255, 104 / 255), 1 / 255),
)
