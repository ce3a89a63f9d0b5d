"""1×1 and depthwise convolutions, each in the form that is fast.

XLA's convolutions of these two kinds are slow on a CPU, two to four times slower than the
matrix product that a 1×1 convolution is, and up to ten times slower than a depthwise
convolution written as a sum (benchmarks/convolutions.py). GPUs and TPUs keep their own
depthwise convolution.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

__all__ = ["DepthwiseConv", "PointwiseConv", "depthwise_conv", "kernel_init"]

# He et al., "Delving Deep into Rectifiers", with the fan of the output.
kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class PointwiseConv(nn.Module):
    """Convolution of 1×1 without a bias. [B, H, W, C] → [B, ⌈H/s⌉, ⌈W/s⌉, features]."""

    features: int
    stride: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", kernel_init, (1, 1, x.shape[-1], self.features))
        x = x[:, :: self.stride, :: self.stride]
        return jnp.matmul(x.astype(self.dtype), kernel[0, 0].astype(self.dtype))


class DepthwiseConv(nn.Module):
    """`depthwise_conv` with its kernel as a parameter. [B, H, W, C] → [B, ⌈H/s⌉, ⌈W/s⌉, C]."""

    side: int
    stride: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", kernel_init, (self.side, self.side, 1, x.shape[-1]))
        return depthwise_conv(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)


def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolves every channel with a kernel of its own, padded as TensorFlow's "SAME".

    Args:
      x: [B, H, W, C].
      kernel: [k, k, 1, C].
      stride: of the output, in positions.

    Returns:
      [B, ⌈H/stride⌉, ⌈W/stride⌉, C], the dtype of `x`.
    """
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: depthwise_shifted(x, kernel, stride),
        default=partial(depthwise_native, stride=stride),
    )


def depthwise_native(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """`depthwise_conv` as XLA's convolution."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_shifted(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """`depthwise_conv` as a sum of shifted products, which XLA fuses into one loop."""
    return _shifted(kernel, stride)(x)


def _shifted(kernel: jax.Array, stride: int) -> Callable[[jax.Array], jax.Array]:
    side = kernel.shape[0]

    def convolve(x):
        padded, rows, columns = _pad(x, side, stride)
        return sum(
            padded[:, i : i + rows : stride, j : j + columns : stride] * kernel[i, j, 0]
            for i in range(side)
            for j in range(side)
        )

    return convolve


def _pad(x: jax.Array, side: int, stride: int) -> tuple[jax.Array, int, int]:
    """`x` with a border of zeros, and the height and width that a tap of a kernel sees."""
    pads = jax.lax.padtype_to_pads(x.shape[1:3], (side, side), (stride, stride), "SAME")
    height, width = (stride * (math.ceil(n / stride) - 1) + 1 for n in x.shape[1:3])
    return jnp.pad(x, ((0, 0), *pads, (0, 0))), height, width


def _forward(x, kernel, stride):
    return depthwise_shifted(x, kernel, stride), (x, kernel)


def _backward(stride, residuals, gradient):
    x, kernel = residuals
    (of_x,) = jax.vjp(_shifted(kernel, stride), x)[1](gradient)

    # Every tap of the kernel sums a product over batch, height and width. As a reduction XLA
    # computes it one channel at a time; a loop over the rows that adds whole arrays
    # [B, W, C] is several times faster.
    side = kernel.shape[0]
    padded, _, columns = _pad(x, side, stride)
    batch, height, width, channels = gradient.shape

    def taps_of_row(i):
        def add(row, sums):
            seen = jax.lax.dynamic_index_in_dim(padded, row * stride + i, 1, keepdims=False)
            wanted = jax.lax.dynamic_index_in_dim(gradient, row, 1, keepdims=False)
            wanted = wanted.astype(jnp.float32)
            return tuple(
                total + seen[:, j : j + columns : stride] * wanted for j, total in enumerate(sums)
            )

        zeros = jnp.zeros((batch, width, channels), jnp.float32)
        sums = jax.lax.fori_loop(0, height, add, (zeros,) * side)
        return jnp.stack([total.sum((0, 1)) for total in sums])

    of_kernel = jax.lax.map(taps_of_row, jnp.arange(side))
    return of_x, of_kernel.reshape(kernel.shape).astype(kernel.dtype)


depthwise_shifted.defvjp(_forward, _backward)
