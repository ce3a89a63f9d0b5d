"""ShuffleNet V2 that ends in a feature map: no global pooling, no classifier.

Ma et al., https://arxiv.org/abs/1807.11164, with the widths and names under which torchvision
publishes ImageNet weights.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cgd_jax.models.family import Family, Scheme
from cgd_jax.preprocess import IMAGENET

__all__ = ["BACKBONES", "FAMILY", "ShuffleNet"]

ModuleDef = Any


class Block(nn.Module):
    """Half of the channels, or all where the stage begins, go through convolutions.

    Then both halves are interleaved, so that the next block works on channels of either.
    """

    out: int  # channels
    stride: int
    first: bool  # of its stage
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        half = self.out // 2
        depthwise = lambda x, name: self.conv(
            x.shape[-1],
            (3, 3),
            self.stride,
            padding=1,
            feature_group_count=x.shape[-1],
            name=name,
        )(x)
        pointwise = partial(self.conv, half, (1, 1))
        if self.first:
            kept = self.norm(name="branch1_1")(depthwise(x, "branch1_0"))
            kept = nn.relu(self.norm(name="branch1_3")(pointwise(name="branch1_2")(kept)))
        else:
            kept, x = jnp.split(x, 2, -1)
        x = nn.relu(self.norm(name="branch2_1")(pointwise(name="branch2_0")(x)))
        x = self.norm(name="branch2_4")(depthwise(x, "branch2_3"))
        x = nn.relu(self.norm(name="branch2_6")(pointwise(name="branch2_5")(x)))
        return jnp.stack([kept, x], -1).reshape(*x.shape[:-1], self.out)


class ShuffleNet(nn.Module):
    """images [B, H, W, 3] → feature map [B, H/s, W/s, C], s = 32, or 16 with `last_stride=1`.

    Attributes:
      widths: channels of the stem, of the three stages, and C.
      stage_sizes: blocks in each of the stages.
      last_stride: of the last stage, 2 as published or 1 as in CGD.
      frozen_blocks: so many of the lowest blocks, and the stem below them, get no gradient.
      remat: computes the inside of every block once more in the backward pass.
      dtype: of the computation; parameters and statistics stay float32.
      conv: the convolution, for `backbones.create` to replace.
    """

    widths: tuple[int, ...]
    stage_sizes: tuple[int, ...] = (4, 8, 4)
    last_stride: int = 1
    frozen_blocks: int = 0
    remat: bool = False
    dtype: jnp.dtype = jnp.float32
    conv: ModuleDef = nn.Conv

    @property
    def layers(self) -> tuple[tuple[str, ...], ...]:
        """The names of the modules below the network, see `backbones.layer_factors`."""
        counts = enumerate(self.stage_sizes, 2)
        blocks = [(f"stage{stage}_{i}",) for stage, count in counts for i in range(count)]
        return (("conv1_0", "conv1_1"), *blocks)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        # The initial weights of He et al. (https://arxiv.org/abs/1502.01852), fan-out mode.
        kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        conv = partial(self.conv, use_bias=False, kernel_init=kernel_init, dtype=self.dtype)
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
        )
        x = conv(self.widths[0], (3, 3), 2, padding=1, name="conv1_0")(x)
        x = nn.relu(norm(name="conv1_1")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        block_of = nn.remat(Block) if self.remat else Block
        last = len(self.stage_sizes) + 1
        for stage, (count, width) in enumerate(
            zip(self.stage_sizes, self.widths[1:-1], strict=True), 2
        ):
            for block in range(count):
                name, first = f"stage{stage}_{block}", block == 0
                stride = (self.last_stride if stage == last else 2) if first else 1
                x = block_of(width, stride, first, conv, norm, name=name)(x)
                if self.frozen_blocks and name in self.layers[self.frozen_blocks]:
                    x = jax.lax.stop_gradient(x)
        x = conv(self.widths[-1], (1, 1), name="conv5_0")(x)
        return nn.relu(norm(name="conv5_1")(x))


def _torchvision_name(module: tuple[str, ...], _: Sequence[str]) -> str:
    return ".".join(module).replace("_", ".")


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "shufflenet_v2_x0_5": partial(ShuffleNet, widths=(24, 48, 96, 192, 1024)),
    "shufflenet_v2_x1_0": partial(ShuffleNet, widths=(24, 116, 232, 464, 1024)),
    "shufflenet_v2_x1_5": partial(ShuffleNet, widths=(24, 176, 352, 704, 1024)),
    "shufflenet_v2_x2_0": partial(ShuffleNet, widths=(24, 244, 488, 976, 2048)),
}
FAMILY = Family(
    title="ShuffleNet",
    members=BACKBONES,
    schemes=(Scheme("torchvision ShuffleNet", "conv1.0.weight", "fc", _torchvision_name),),
    normalization=IMAGENET,
    options={"frozen_blocks": 0},
)
