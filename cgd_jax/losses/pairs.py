"""What losses on pairs share: distances, similarities, and which pairs of a batch count.

Rows are the images of a batch, the anchors. Columns are the same images and, behind them, those
of a cross-batch memory, if there is one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cgd_jax.combination import l2_normalize, to_float32

__all__ = ["Memory", "Miner", "empty_memory", "pairwise_distances", "push", "similarities"]

# distances [B, N] float32, positive [B, N], negative [B, N] → the masks of what is kept.
Miner = Callable[[Array, Array, Array], tuple[Array, Array]]

# Coordinates and distances beyond it count as it where a loss multiplies them with one another,
# so that sums of its terms stay in float32.
LIMIT = 1e12


class Memory(NamedTuple):
    """Embeddings of earlier batches, the latest first: they are compared with, not trained.

    Cross-batch memory, Wang et al., CVPR 2020, https://arxiv.org/abs/1912.06798.
    """

    vectors: Array  # [M, D] float32
    labels: Array  # [M] int32; -1 where nothing was stored yet


class PairOptions(TypedDict, total=False):
    """What every loss on pairs takes by keyword."""

    memory: Memory | None
    miner: Miner | None


class Pairs(NamedTuple):
    """Which columns an anchor is to be near to, and which far from."""

    embeddings: Array  # [B, D] float32: the anchors, of the batch
    references: Array  # [N, D] float32: the batch, then the memory
    positive: Array  # [B, N] bool: same class but another image
    negative: Array  # [B, N] bool: another class
    center: Array  # [D], the mean of the batch

    @property
    def valid(self) -> Array:
        """[B] bool: whether an anchor has both."""
        return self.positive.any(1) & self.negative.any(1)

    @property
    def distances(self) -> Array:
        """[B, N] float32."""
        return distances_from(self.center, self.embeddings, self.references)

    @property
    def similarities(self) -> Array:
        """[B, N] float32, cosines."""
        return similarities(self.embeddings, self.references)


def pairwise_distances(x: Array, y: Array | None = None) -> Array:
    """Euclidean distances [N, M] float32 between the rows of `x` [N, D] and `y` [M, D], or `x`.

    Where the distance is zero, and the slope of the root infinite, the gradient is zero.

    >>> pairwise_distances(jnp.array([[0.0, 0.0], [3.0, 4.0]])).tolist()
    [[0.0, 5.0], [5.0, 0.0]]
    """
    x = to_float32(x)
    return distances_from(mean_of(x), x, x if y is None else to_float32(y))


def distances_from(center: Array, x: Array, y: Array) -> Array:
    """Distances as of `pairwise_distances`; the center [D] decides what is rounded."""
    # The squares of norms beyond 1e19 are infinite. A power of two, so that nothing is rounded.
    largest = jnp.maximum(jnp.abs(x).max(), jnp.abs(y).max())
    scale = jnp.ldexp(1.0, jnp.clip(jnp.frexp(jax.lax.stop_gradient(largest))[1], 0, 100))
    x, y = x / scale, y / scale
    # Seen from their mean: |x|² + |y|² - 2 x·y of long vectors that lie close together has no
    # digit of their distance in it.
    center = jax.lax.stop_gradient(center) / scale
    x, y = x - center, y - center
    squared = jnp.sum(x**2, 1)[:, None] + jnp.sum(y**2, 1)[None, :] - 2 * products(x, y)
    return scale * safe_root(squared)


def mean_of(x: Array) -> Array:
    """The mean [D] of rows, whose sum may be beyond float32."""
    return (x / len(x)).sum(0)


def similarities(x: Array, y: Array | None = None) -> Array:
    """Cosines [N, M] float32 between the rows of `x` [N, D] and `y` [M, D], or `x`.

    >>> similarities(jnp.array([[2.0, 0.0], [0.0, 3.0]])).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    x = l2_normalize(to_float32(x))
    return products(x, x if y is None else l2_normalize(to_float32(y)))


def products(x: Array, y: Array) -> Array:
    # Full precision: the default on GPU and TPU keeps 10 or 8 bits of mantissa, and
    # near neighbours differ by less than that.
    return jnp.dot(x, y.T, precision=jax.lax.Precision.HIGHEST)


def safe_root(squared: Array) -> Array:
    """The square root, with 0 for what is not positive and a gradient of 0 there."""
    is_zero = squared <= 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, squared)))


def empty_memory(size: int, dim: int) -> Memory:
    """Returns a memory for `size` embeddings [dim], with nothing in it.

    >>> empty_memory(3, 8).labels.tolist()
    [-1, -1, -1]
    """
    return Memory(jnp.zeros((size, dim)), jnp.full(size, -1, jnp.int32))


def push(memory: Memory, embeddings: Array, labels: Array) -> Memory:
    """Puts a batch, `embeddings [B, D]` and `labels [B]` from 0, before the oldest of a memory.

    No gradient passes through the copy. The new memory is as large as before: of a batch that
    does not fit the first are kept.

    >>> push(empty_memory(3, 1), jnp.ones((2, 1)), jnp.array([7, 8])).labels.tolist()
    [7, 8, -1]
    """
    size = len(memory.labels)
    stored = jax.lax.stop_gradient(jnp.asarray(embeddings, jnp.float32))
    return Memory(
        jnp.concatenate([stored, memory.vectors])[:size],
        jnp.concatenate([jnp.asarray(labels, jnp.int32), memory.labels])[:size],
    )


def pairs_of(
    embeddings: Array,
    labels: Array,
    memory: Memory | None = None,
    miner: Miner | None = None,
    anchors: tuple[Array, Array, Array] | None = None,
) -> Pairs:
    """Finds the pairs of a batch, and of its images with a memory, that a miner keeps.

    `anchors` are some of the images [R, D], their labels, and their rows in the batch; else all.
    """
    embeddings, labels = checked(embeddings, labels)
    vectors, own, rows = anchors or (embeddings, labels, jnp.arange(len(labels)))
    references, known, center = embeddings, jnp.ones(len(labels), bool), mean_of(embeddings)
    if memory is not None:  # in parts of which there may be nothing yet
        references = jnp.concatenate([embeddings, jax.lax.stop_gradient(memory.vectors)])
        labels = jnp.concatenate([labels, memory.labels.astype(labels.dtype)])
        known = jnp.concatenate([known, memory.labels >= 0])
    same = own[:, None] == labels[None, :]
    positive = same & (rows[:, None] != jnp.arange(len(labels))[None, :])
    pairs = Pairs(vectors, references, positive, ~same & known, center)
    if miner is None:
        return pairs
    distances = jax.lax.stop_gradient(pairs.distances)
    positive, negative = miner(distances, pairs.positive, pairs.negative)
    return pairs._replace(positive=positive, negative=negative)


def masked_mean(values: Array, mask: Array, axis: int | None = None) -> Array:
    """The mean of `values` where `mask`; 0 where the mask is empty."""
    return jnp.where(mask, values, 0.0).sum(axis) / jnp.maximum(mask.sum(axis), 1)


def batch_mean(values: Array, mask: Array, embeddings: Array) -> Array:
    """`masked_mean` as a loss: NaN if an embedding is not finite, whatever the mask."""
    return nan_unless_finite(embeddings, masked_mean(values, mask))


def nan_unless_finite(embeddings: Array, loss: Array) -> Array:
    return jnp.where(jnp.isfinite(jnp.asarray(embeddings)).all(), loss, jnp.nan)


def masked_logsumexp(values: Array, mask: Array, axis: int = 1) -> Array:
    """Log Σ exp over the mask; a very low number, with a gradient of 0, where it is empty."""
    return jax.nn.logsumexp(jnp.where(mask, values, -1e30), axis)


def soft_sum(values: Array, mask: Array, axis: int = 1) -> Array:
    """log(1 + Σ exp) over the mask, without overflow."""
    return jax.nn.softplus(masked_logsumexp(values, mask, axis))


def checked(values: Any, labels: Any, name: str = "embeddings") -> tuple[Array, Array]:
    """Returns values in float32, and labels; raises ValueError for wrong ranks, lengths, dtypes."""
    values = jnp.asarray(values)
    if not isinstance(labels, Array):  # which holds 32 bits, and would cut longer ids off
        labels = np.asarray(labels)
    if values.ndim != 2 or labels.shape != values.shape[:1]:
        raise ValueError(
            f"{name} must have shape [B, ...] of rank 2 and labels [B]; got {name} "
            f"{values.shape} and labels {labels.shape}."
        )
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point; got {values.dtype}.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers; got {labels.dtype}.")
    return to_float32(values), labels
