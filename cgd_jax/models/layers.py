"""What the networks of all families have, and the layers that several of them are made of."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cgd_jax.models import cpu_ops

# Makes a layer of a network, or runs one; see `ConvNet.make_layer`.
Layer = Callable[..., Any]

# Of transformers and ConvNeXts.
small = nn.initializers.truncated_normal(0.02)
Dense = partial(nn.Dense, kernel_init=small)
LayerNorm = partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)


class Backbone(nn.Module, kw_only=True):
    """A network of blocks: images [B, H, W, 3] and `train` → feature map [B, H', W', C].

    A subclass has `STEM` and `blocks`, and runs them by `run_blocks`, or each by `run_block`.
    """

    # The names of the modules and parameters below the first block.
    STEM: ClassVar[tuple[str, ...]] = ()

    frozen_blocks: int = 0  # so many of the lowest, and the stem below them, get no gradient
    remat: bool = False  # computes the inside of every block once more in the backward pass
    dtype: jnp.dtype = jnp.float32  # of the computation; parameters and statistics stay float32
    conv: Layer = cpu_ops.Conv  # flax's own is slow on a CPU; elsewhere it is the same

    @property
    def blocks(self) -> Mapping[str, Mapping[str, Any]]:
        """The blocks from the lowest to the highest: name → the options that differ."""
        raise NotImplementedError

    @property
    def layers(self) -> tuple[tuple[str, ...], ...]:
        """The names of the modules and parameters of the stem, then of every block."""
        return (self.STEM, *((name,) for name in self.blocks))

    @nn.nowrap
    def run_blocks(self, block: type[nn.Module], x: jax.Array, **options) -> jax.Array:
        """Runs all blocks, each with its own options and these."""
        for name, own in self.blocks.items():
            x = self.run_block(block, name, x, **own, **options)
        return x

    @nn.nowrap
    def run_block(self, block: type[nn.Module], name: str, x: jax.Array, **options) -> jax.Array:
        """Makes the block of this name and runs it."""
        block = nn.remat(block) if self.remat else block
        x = block(**options, name=name)(x)
        highest_frozen = self.frozen_blocks and name in self.layers[self.frozen_blocks]
        return jax.lax.stop_gradient(x) if highest_frozen else x


class ConvNet(Backbone, kw_only=True):
    """A backbone that makes its feature map smaller from stage to stage."""

    last_stride: int = 1  # of the last downsampling, 2 as published or 1 as in CGD

    @nn.nowrap
    def strides(self, published: Sequence[int]) -> list[int]:
        """Returns the strides of the stages, with `last_stride` in the place of the last 2."""
        strides = list(published)
        if 2 in strides:
            strides[-1 - strides[::-1].index(2)] = self.last_stride
        return strides

    @nn.nowrap
    def make_layer(
        self, train, momentum=0.9, epsilon=1e-5, use_bias=False, activation=nn.relu, padding=None
    ) -> Layer:
        """Returns what runs a convolution of side × side, BatchNorm, and the activation."""
        kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al.
        conv = partial(self.conv, use_bias=use_bias, kernel_init=kernel_init, dtype=self.dtype)
        statistics = {"use_running_average": not train, "momentum": momentum, "epsilon": epsilon}
        norm = partial(nn.BatchNorm, **statistics, dtype=self.dtype)

        def layer(x, channels, side, names, stride=1, groups=1, linear=False):
            options = {"feature_group_count": groups, "name": names[0]}
            x = conv(channels, (side, side), stride, padding or side // 2, **options)(x)
            x = norm(name=names[1])(x)
            return x if linear else activation(x)

        return layer


class StagedNet(ConvNet, kw_only=True):
    """One of stages0_0, stages0_1, …, with a downsampling in front of stages1_0 and of those above.

    The downsampling of a stage is a part of its first block.
    """

    DOWNSAMPLE: ClassVar[tuple[str, ...]] = ()  # the ends of names such as downsample1_norm

    depths: tuple[int, ...]  # blocks in each of the stages
    # Probability with which training leaves the last block out; linearly less from the first on.
    drop_path: float = 0.0

    @property
    def blocks(self) -> dict[str, dict[str, float]]:
        names = [f"stages{stage}_{i}" for stage, n in enumerate(self.depths) for i in range(n)]
        rates = np.linspace(0, self.drop_path, len(names)).tolist()
        return {name: {"drop_path": rate} for name, rate in zip(names, rates, strict=True)}

    @property
    def layers(self) -> tuple[tuple[str, ...], ...]:
        below = {
            f"stages{stage}_0": tuple(f"downsample{stage}_{part}" for part in self.DOWNSAMPLE)
            for stage in range(1, len(self.depths))
        }
        return (self.STEM, *((*below.get(name, ()), name) for name in self.blocks))


class LayerScale(nn.Module):
    """Multiplies every channel by a learned factor (https://arxiv.org/abs/2103.17239)."""

    initial: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gamma = self.param("gamma", nn.initializers.constant(self.initial), x.shape[-1:])
        return x * gamma.astype(x.dtype)


def drop_path(x: jax.Array, rate: float, train: bool, name: str) -> jax.Array:
    """Leaves a branch out for some images (stochastic depth, https://arxiv.org/abs/1603.09382)."""
    axes = range(1, x.ndim)
    return nn.Dropout(rate, axes, not train, rng_collection="drop_path", name=name)(x)


def is_ampere() -> bool:
    """Returns whether the device is a GPU of NVIDIA's since Ampere, with units for bfloat16."""
    device = jax.devices()[0]
    return device.platform == "gpu" and float(getattr(device, "compute_capability", 0)) >= 8
