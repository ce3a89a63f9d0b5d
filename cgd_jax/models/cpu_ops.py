"""Convolution and max-pooling in forms that are fast on a CPU; GPUs and TPUs keep XLA's own.

`Conv` and `max_pool` take the place of `nn.Conv` and `nn.max_pool` in a backbone (`backbones`
puts them there): the same arguments, parameters and results. What XLA makes of a convolution on a
CPU depends on how it is written (benchmarks/convolutions.py has the times):

- A 1×1 convolution is a matrix product, and one of two matrices: with more axes, the gradient
  with respect to the kernel copies the transposed gradient of the output first, which takes
  longer than the product.
- XLA brings the two gradients of any other convolution into the order of axes that its fast
  implementation wants, but not inside of loops (`jax.lax.scan`, `jax.lax.map`), where they are
  up to 250 times slower. Here they are written in that order.
- A depthwise convolution is up to ten times faster as a sum of shifted products.
- The gradient of XLA's max-pooling carries four indices beside every value through the search
  for the maximum, and then adds to one place at a time. A choice among the shifted copies of
  the input, of which JAX derives the gradient, is about four times faster.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

__all__ = [
    "Conv",
    "conv",
    "conv_canonical",
    "conv_native",
    "depthwise_conv",
    "depthwise_native",
    "depthwise_shifted",
    "max_pool",
    "max_pool_native",
    "max_pool_taps",
    "pointwise_conv",
]

# Zeros before and after the rows, and before and after the columns.
Padding = tuple[tuple[int, int], tuple[int, int]]


class Conv(nn.Module):
    """`nn.Conv` without a bias. [B, H, W, C] → [B, H', W', features].

    Attributes:
      features: channels of the output.
      kernel_size: height and width.
      strides: of the output, in positions, the same along both axes.
      padding: "SAME" as TensorFlow has it, or zeros on every side.
      feature_group_count: groups into which channels are divided.
      use_bias: False; taken so that the arguments are those of `nn.Conv`.
      kernel_init: draws the kernel [h, w, C / groups, features].
      dtype: of the computation.
    """

    features: int
    kernel_size: Sequence[int]
    strides: int = 1
    padding: int | str = "SAME"
    feature_group_count: int = 1
    use_bias: bool = False
    kernel_init: Callable = nn.initializers.lecun_normal()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.use_bias:
            raise ValueError("cpu_ops.Conv has no bias; use nn.Conv.")
        sides, stride, groups = tuple(self.kernel_size), self.strides, self.feature_group_count
        shape = (*sides, x.shape[-1] // groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape).astype(self.dtype)
        x = x.astype(self.dtype)
        padding = ((self.padding,) * 2,) * 2
        if self.padding == "SAME":
            padding = tuple(jax.lax.padtype_to_pads(x.shape[1:3], sides, (stride, stride), "SAME"))
        if sides == (1, 1) and groups == 1 and self.padding in ("SAME", 0):
            return pointwise_conv(x[:, ::stride, ::stride], kernel[0, 0])
        if groups == x.shape[-1] == self.features and self.padding == "SAME":
            return depthwise_conv(x, kernel, stride)
        return conv(x, kernel, stride, padding, groups)


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


def pointwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies every position by a matrix. [B, H, W, C], [C, D] → [B, H, W, D]."""

    def flat(x, kernel):
        return jnp.matmul(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)

    return jax.lax.platform_dependent(x, kernel, cpu=flat, default=jnp.matmul)


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


# The pooling behind the stem of a ResNet: [B, H, W, C] → [B, ⌈H/2⌉, ⌈W/2⌉, C].
_STEM_POOLING = {"window_shape": (3, 3), "strides": (2, 2), "padding": ((1, 1), (1, 1))}


def max_pool(
    x: jax.Array, window_shape: tuple[int, int], strides: tuple[int, int], padding: Padding
) -> jax.Array:
    """Pools as `nn.max_pool` does; windows of 3×3 with stride 2 and padding 1 fast on a CPU.

    Where several positions of a window have its maximum, the first one gets the gradient.
    """
    wanted = {"window_shape": window_shape, "strides": strides, "padding": padding}
    if wanted != _STEM_POOLING:
        return nn.max_pool(x, **wanted)
    return jax.lax.platform_dependent(x, cpu=max_pool_taps, default=max_pool_native)


max_pool_native = partial(nn.max_pool, **_STEM_POOLING)


def max_pool_taps(x: jax.Array) -> jax.Array:
    """Pools windows of 3×3 with stride 2 and padding 1, by a choice among their nine taps."""
    height, width = (n + n % 2 for n in x.shape[1:3])
    pads = ((0, 0), (1, height - x.shape[1]), (1, width - x.shape[2]), (0, 0))
    padded = jnp.pad(x, pads, constant_values=-jnp.inf)
    taps = [padded[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)]
    best, winner = taps[0], jnp.zeros(taps[0].shape, jnp.int8)
    for number, tap in enumerate(taps[1:], 1):
        wins = (tap > best) | jnp.isnan(tap)
        best, winner = jnp.where(wins, tap, best), jnp.where(wins, jnp.int8(number), winner)
    return sum(jnp.where(winner == number, tap, 0) for number, tap in enumerate(taps))
