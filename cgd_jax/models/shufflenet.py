"""ShuffleNet V2 that ends in a feature map: no global pooling, no classifier.

Ma et al., https://arxiv.org/abs/1807.11164, with the widths and names under which torchvision
publishes ImageNet weights.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from cgd_jax.models.family import Family, Scheme
from cgd_jax.models.layers import ConvNet, Layer
from cgd_jax.preprocess import IMAGENET


class Block(nn.Module):
    """Half of the channels, or all where the stage begins, go through convolutions.

    Then both halves are interleaved, so that the next block works on channels of either.
    """

    out: int  # channels
    stride: int
    first: bool  # of its stage
    layer: Layer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        half = self.out // 2

        def depthwise(x, names):
            channels = x.shape[-1]
            return self.layer(x, channels, 3, names, self.stride, channels, linear=True)

        if self.first:
            kept = depthwise(x, ("branch1_0", "branch1_1"))
            kept = self.layer(kept, half, 1, ("branch1_2", "branch1_3"))
        else:
            kept, x = jnp.split(x, 2, -1)
        x = self.layer(x, half, 1, ("branch2_0", "branch2_1"))
        x = depthwise(x, ("branch2_3", "branch2_4"))
        x = self.layer(x, half, 1, ("branch2_5", "branch2_6"))
        return jnp.stack([kept, x], -1).reshape(*x.shape[:-1], self.out)


class ShuffleNet(ConvNet):
    """images [B, H, W, 3] → feature map [B, H/s, W/s, C], s = 32, or 16 with `last_stride=1`."""

    widths: tuple[int, ...]  # channels of the stem, of the three stages, and C
    stage_sizes: tuple[int, ...] = (4, 8, 4)

    STEM = ("conv1_0", "conv1_1")

    @property
    def blocks(self) -> dict[str, dict[str, int]]:
        strides = self.strides([2] * len(self.stage_sizes))
        stages = zip(self.stage_sizes, self.widths[1:-1], strides, strict=True)
        return {
            f"stage{stage}_{i}": {"out": width, "stride": 1 if i else stride, "first": i == 0}
            for stage, (count, width, stride) in enumerate(stages, 2)
            for i in range(count)
        }

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        layer = self.make_layer(train)
        x = layer(x, self.widths[0], 3, ("conv1_0", "conv1_1"), 2)
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        x = self.run_blocks(Block, x, layer=layer)
        return layer(x, self.widths[-1], 1, ("conv5_0", "conv5_1"))


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "shufflenet_v2_x0_5": partial(ShuffleNet, widths=(24, 48, 96, 192, 1024)),
    "shufflenet_v2_x1_0": partial(ShuffleNet, widths=(24, 116, 232, 464, 1024)),
    "shufflenet_v2_x1_5": partial(ShuffleNet, widths=(24, 176, 352, 704, 1024)),
    "shufflenet_v2_x2_0": partial(ShuffleNet, widths=(24, 244, 488, 976, 2048)),
}
FAMILY = Family(
    title="ShuffleNet",
    members=BACKBONES,
    schemes=(Scheme("torchvision ShuffleNet", "conv1.0.weight", "fc.", {"_": "."}),),
    normalization=IMAGENET,
)
