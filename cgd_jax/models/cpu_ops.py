"""Convolution in forms that are fast on a CPU, with the signatures of JAX and Flax.

On GPUs and TPUs it is XLA's own. What XLA makes of it on a CPU depends on how it is
written (benchmarks/convolutions.py has the times):

- A 1×1 convolution is a matrix product, and one of two matrices: with more axes, the gradient
  with respect to the kernel copies the transposed gradient of the output first, which takes
  longer than the product.
- A wide 3×3 convolution takes 2.25 times fewer multiplications over tiles of 2 × 2 outputs
  (Winograd's minimal filters). Its transforms cost memory traffic, which pays from 256 channels.
- A depthwise convolution is up to ten times faster as a sum of shifted products.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

# Of rows and of columns.
Strides = tuple[int, int]
# Zeros before and after the rows, and before and after the columns.
Padding = tuple[tuple[int, int], tuple[int, int]]


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` as `flax.linen.Conv` calls it: [B, H, W, C] → [B, H', W', D].

    With dilations, a precision or groups of several channels all platforms use XLA's convolution.
    """
    convolve: Callable[..., jax.Array] = jax.lax.conv_general_dilated
    native = partial(convolve, window_strides=window_strides, padding=padding, **options)
    dilations = (*(options.get("lhs_dilation") or ()), *(options.get("rhs_dilation") or ()))
    other = lhs.ndim != 4 or options.get("precision") or any(n != 1 for n in dilations)
    groups = options.get("feature_group_count", 1)
    if other or not (groups == 1 or groups == lhs.shape[-1] == rhs.shape[-1]):
        return native(lhs, rhs)
    rows, columns = window_strides
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
    (top, bottom), (left, right) = padding
    strides, pads = (rows, columns), ((top, bottom), (left, right))
    if groups > 1:
        fast = lambda x, kernel: _depthwise(x, kernel, strides, pads)
    elif rhs.shape[:2] == (1, 1) and pads == ((0, 0), (0, 0)):
        fast = lambda x, kernel: _pointwise(x, kernel, strides)
    elif _is_wide(lhs, rhs, strides, pads):
        fast = lambda x, kernel: _winograd(x, kernel, pads)
    else:
        return native(lhs, rhs)
    return jax.lax.platform_dependent(lhs, rhs, cpu=fast, default=native)


# Its identity is part of a network's hash, which finds what was compiled before: make no second.
Conv = partial(nn.Conv, conv_general_dilated=conv_general_dilated)


def _pointwise(x: jax.Array, kernel: jax.Array, strides: Strides) -> jax.Array:
    x = x[:, :: strides[0], :: strides[1]]
    return jnp.matmul(x.reshape(-1, x.shape[-1]), kernel[0, 0]).reshape(*x.shape[:-1], -1)


# From where products outweigh the transforms of tiles, and those of the kernel.
WIDE_CHANNELS = 256
MANY_TILES = 257

# The transforms of F(2×2, 3×3), Lavin & Gray (https://arxiv.org/abs/1509.09308), section 4.1.
_INPUT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float32)
_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
_OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], np.float32)


def _is_wide(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Padding) -> bool:
    return (
        (kernel.shape[:2], strides) == ((3, 3), (1, 1))
        and max(map(max, pads)) <= 2
        and x.dtype == kernel.dtype == jnp.float32  # sums of tiles need the digits
        and min(kernel.shape[2:]) >= WIDE_CHANNELS
        and not jax.export.is_symbolic_dim(x.shape[0])  # of an exported program, for any batch
        and x.shape[0] * math.prod(_tile_counts(x, pads)) >= MANY_TILES
    )


def _tile_counts(x: jax.Array, pads: Padding) -> tuple[int, int]:
    """Returns how many tiles of 2 × 2 outputs there are, in rows and in columns."""
    rows, columns = (-(-(x.shape[1 + i] + sum(pads[i]) - 2) // 2) for i in range(2))
    return rows, columns


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _winograd(x: jax.Array, kernel: jax.Array, pads: Padding) -> jax.Array:
    """A 3×3 convolution of stride 1 as 16 products of matrices [tiles, C] and [C, D]."""
    return _of_tiles("jibtuc,jicd->jibtud", x, kernel, _KERNEL, pads)


def _of_tiles(products: str, x, kernel, transform, pads) -> jax.Array:
    """Convolves; `transform` is of the kernel, and `products` says which of its axes are summed."""
    kernel = _mixed(transform, _mixed(transform, kernel, 0).swapaxes(0, 1), 0)
    y = jnp.einsum(products, *jax.lax.optimization_barrier((_tiles(x, pads), kernel)))
    y = _mixed(_OUTPUT, y, 4)  # [4, B, T, U, 2, D]
    y = _mixed(_OUTPUT, y, 2)  # [B, T, 2, U, 2, D]
    y = y.reshape(y.shape[0], 2 * y.shape[1], 2 * y.shape[3], -1)
    rows, columns = (x.shape[1 + i] + sum(pads[i]) - 2 for i in range(2))
    return y[:, :rows, :columns]


def _mixed(matrix: np.ndarray, parts: Sequence[jax.Array] | jax.Array, axis: int) -> jax.Array:
    """Returns the sums of parts that the rows of a matrix weigh, along a new axis.

    Unlike a product of matrices it is one loop, into which XLA fuses what comes before and after.
    """
    weights = [
        column.reshape(-1, *(1,) * (part.ndim - axis))
        for column, part in zip(matrix.T, parts, strict=True)
    ]
    terms = [w * jnp.expand_dims(part, axis) for w, part in zip(weights, parts, strict=True)]
    return sum(terms[1:], terms[0])


def _tiles(x: jax.Array, pads: Padding) -> jax.Array:
    """Returns the transformed tiles, 4 × 4 positions every 2: [4, 4, B, T, U, C]."""
    counts = _tile_counts(x, pads)
    ends = [2 * n + 2 - x.shape[1 + i] - pads[i][0] for i, n in enumerate(counts)]
    x = jnp.pad(x, ((0, 0), (pads[0][0], ends[0]), (pads[1][0], ends[1]), (0, 0)))
    rows = _mixed(_INPUT, [x[:, i : i + 2 * counts[0] - 1 : 2] for i in range(4)], 0)
    columns = [rows[:, :, :, i : i + 2 * counts[1] - 1 : 2] for i in range(4)]
    return _mixed(_INPUT, columns, 0)


def _winograd_forward(x, kernel, pads):
    return _winograd(x, kernel, pads), (x, kernel)


def _winograd_backward(pads, residuals, gradient):
    x, kernel = residuals
    around = tuple((2 - before, 2 - after) for before, after in pads)
    of_x = _of_tiles("jibtud,jicd->jibtuc", gradient, kernel, _KERNEL[:, ::-1], around)
    # What is linear in the kernel, backwards.
    tiles = _tiles(x, pads)
    height, width = _tile_counts(x, pads)
    odd = [(0, 2 * n - gradient.shape[1 + i]) for i, n in enumerate((height, width))]
    gradient = jnp.pad(gradient, ((0, 0), *odd, (0, 0)))
    gradient = gradient.reshape(len(x), height, 2, width, 2, -1)
    gradient = _mixed(_OUTPUT.T, [gradient[:, :, i] for i in range(2)], 0)
    gradient = _mixed(_OUTPUT.T, [gradient[..., i, :] for i in range(2)], 0)
    # One after the other: XLA would fuse the transposition of all tiles into what computes them,
    # which then writes across memory.
    flat = [part.reshape(16, -1, part.shape[-1]) for part in (tiles, gradient)]
    products = jax.lax.map(lambda pair: pair[0].T @ pair[1], tuple(flat))
    products = products.reshape(4, 4, *products.shape[1:])
    of_kernel = _mixed(_KERNEL.T, _mixed(_KERNEL.T, products, 1), 0)
    return of_x, of_kernel


_winograd.defvjp(_winograd_forward, _winograd_backward)


def _sum_of_shifted(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Padding) -> jax.Array:
    """A depthwise convolution as a sum of products, which XLA fuses into one loop."""
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    height, width = kernel.shape[:2]
    rows, columns = (
        stride * ((padded.shape[1 + i] - kernel.shape[i]) // stride) + 1
        for i, stride in enumerate(strides)
    )
    terms = [
        padded[:, i : i + rows : strides[0], j : j + columns : strides[1]] * kernel[i, j, 0]
        for i in range(height)
        for j in range(width)
    ]
    return sum(terms[1:], terms[0])


_depthwise = jax.custom_vjp(_sum_of_shifted, nondiff_argnums=(2, 3))


def _depthwise_forward(x, kernel, strides, pads):
    return _sum_of_shifted(x, kernel, strides, pads), (x, kernel)


def _depthwise_backward(strides, pads, residuals, gradient):
    x, kernel = residuals
    (of_x,) = jax.vjp(lambda x: _sum_of_shifted(x, kernel, strides, pads), x)[1](gradient)

    # Every tap of the kernel sums a product over batch, height and width. As a reduction XLA
    # computes it one channel at a time; a loop over the rows that adds whole arrays
    # [B, W, C] is several times faster.
    side, across = kernel.shape[:2]
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    batch, height, width, channels = gradient.shape
    columns = strides[1] * (width - 1) + 1

    def taps_of_row(i):
        def add(row, sums):
            seen = jax.lax.dynamic_index_in_dim(padded, row * strides[0] + i, 1, keepdims=False)
            wanted = jax.lax.dynamic_index_in_dim(gradient, row, 1, keepdims=False)
            wanted = wanted.astype(jnp.float32)
            return tuple(
                total + seen[:, j : j + columns : strides[1]] * wanted
                for j, total in enumerate(sums)
            )

        zeros = jnp.zeros((batch, width, channels), jnp.float32)
        sums = jax.lax.fori_loop(0, height, add, (zeros,) * across)
        return jnp.stack([total.sum((0, 1)) for total in sums])

    of_kernel = jax.lax.map(taps_of_row, jnp.arange(side))
    return of_x, of_kernel.reshape(kernel.shape).astype(kernel.dtype)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)
