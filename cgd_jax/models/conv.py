"""Convolutions, each kind in the form that is fast.

What XLA makes of a convolution on a CPU depends on how it is written (benchmarks/convolutions.py
has the times):

- A 1×1 convolution is a matrix product, and one of two matrices: with more axes, the gradient
  with respect to the kernel copies the transposed gradient of the output first, which takes
  longer than the product.
- XLA brings the two gradients of any other convolution into the order of axes that its fast
  implementation wants, but not inside of loops (`jax.lax.scan`, `jax.lax.map`), where they are
  up to 250 times slower. Here they are written in that order.
- A depthwise convolution is up to ten times faster as a sum of shifted products.

GPUs and TPUs keep their own convolutions.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

__all__ = [
    "Conv",
    "DepthwiseConv",
    "PointwiseConv",
    "conv",
    "conv_canonical",
    "conv_native",
    "depthwise_conv",
    "depthwise_native",
    "depthwise_shifted",
    "kernel_init",
    "pointwise_conv",
]

# He et al., "Delving Deep into Rectifiers", with the fan of the output.
kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

# Zeros before and after the rows, and before and after the columns.
Padding = tuple[tuple[int, int], tuple[int, int]]


class Conv(nn.Module):
    """Convolution of k×k without a bias. [B, H, W, C] → [B, H', W', features].

    Attributes:
      features: channels of the output.
      side: k, odd.
      stride: of the output, in positions.
      padding: "SAME" as TensorFlow has it, or zeros on every side.
      groups: into which channels are divided.
      dtype: of the computation.
    """

    features: int
    side: int
    stride: int = 1
    padding: int | str = "SAME"
    groups: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        sides, strides = (self.side,) * 2, (self.stride,) * 2
        shape = (*sides, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", kernel_init, shape)
        padding = ((self.padding,) * 2,) * 2
        if self.padding == "SAME":
            padding = tuple(jax.lax.padtype_to_pads(x.shape[1:3], sides, strides, "SAME"))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        return conv(x, kernel, self.stride, padding, self.groups)


def conv(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, groups: int = 1
) -> jax.Array:
    """Convolves, as deep learning understands it.

    Args:
      x: [B, H, W, C].
      kernel: [k, l, C/groups, D].
      stride: of the output, in positions.
      padding: zeros around `x`.
      groups: into which channels are divided; with more than one all platforms use XLA's.

    Returns:
      [B, H', W', D], the dtype of `x`.
    """
    native = partial(conv_native, stride=stride, padding=padding, groups=groups)
    if groups > 1:
        return native(x, kernel)
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: conv_canonical(x, kernel, stride, padding),
        default=native,
    )


def conv_native(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, groups: int = 1
) -> jax.Array:
    """`conv` as XLA's convolution, with the gradients that JAX derives."""
    return _convolution(
        x, kernel, window_strides=(stride, stride), padding=padding, feature_group_count=groups
    )


# The order of axes for which XLA has fast code on a CPU.
_convolution = partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_canonical(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """`conv`, whose gradients are convolutions in the same order of axes."""
    return conv_native(x, kernel, stride, padding)


def _conv_forward(x, kernel, stride, padding):
    return conv_canonical(x, kernel, stride, padding), (x, kernel)


def _conv_backward(stride, padding, residuals, gradient):
    x, kernel = residuals
    axes = range(2)
    # How far the last tap of the kernel at the last position reaches behind x.
    ends = [
        stride * (gradient.shape[1 + i] - 1) + kernel.shape[i] - padding[i][0] - x.shape[1 + i]
        for i in axes
    ]
    # Every position of x sums over the taps that saw it: the kernel, turned around.
    of_x = _convolution(
        gradient,
        kernel[::-1, ::-1].swapaxes(2, 3),
        window_strides=(1, 1),
        padding=[
            (kernel.shape[i] - 1 - padding[i][0], kernel.shape[i] - 1 - ends[i]) for i in axes
        ],
        lhs_dilation=(stride, stride),
    )
    # Every tap sums over the positions and images: the images take the place of channels.
    of_kernel = _convolution(
        x.transpose(3, 1, 2, 0),
        gradient.transpose(1, 2, 0, 3),
        window_strides=(1, 1),
        padding=[(padding[i][0], ends[i]) for i in axes],
        rhs_dilation=(stride, stride),
    )
    return of_x, of_kernel.transpose(1, 2, 0, 3)


conv_canonical.defvjp(_conv_forward, _conv_backward)


class PointwiseConv(nn.Module):
    """Convolution of 1×1 without a bias. [B, H, W, C] → [B, ⌈H/s⌉, ⌈W/s⌉, features]."""

    features: int
    stride: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", kernel_init, (1, 1, x.shape[-1], self.features))
        x = x[:, :: self.stride, :: self.stride]
        return pointwise_conv(x.astype(self.dtype), kernel[0, 0].astype(self.dtype))


def pointwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies every position by a matrix. [B, H, W, C], [C, D] → [B, H, W, D]."""

    def flat(x, kernel):
        return jnp.matmul(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)

    return jax.lax.platform_dependent(x, kernel, cpu=flat, default=jnp.matmul)


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


def _depthwise_forward(x, kernel, stride):
    return depthwise_shifted(x, kernel, stride), (x, kernel)


def _depthwise_backward(stride, residuals, gradient):
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


depthwise_shifted.defvjp(_depthwise_forward, _depthwise_backward)
