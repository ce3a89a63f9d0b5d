"""Miners: which pairs of a batch a loss looks at, chosen by their distances.

A miner takes `distances [B, N]` and boolean masks [B, N] of the `positive` and the `negative`
pairs, and returns the masks of those that it keeps. Every loss on pairs takes one as `miner`; its
triplets are all that the kept pairs of an anchor form. Nothing here is differentiated, but for
what `hardest` returns.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["MINERS", "batch_hard", "distance_weighted", "hardest", "semi_hard"]

Masks = tuple[Array, Array]


def hardest(distances: Array, positive: Array, negative: Array) -> Masks:
    """Returns every anchor's distance [B] to its farthest positive and to its nearest negative.

    They are -inf and inf where there is none.

    >>> hardest(jnp.array([[1.0, 2.0]]), jnp.ones((1, 2), bool), jnp.zeros((1, 2), bool))
    (Array([2.], dtype=float32), Array([inf], dtype=float32))
    """
    farthest = jnp.where(positive, distances, -jnp.inf).max(1)
    nearest = jnp.where(negative, distances, jnp.inf).min(1)
    return farthest, nearest


def batch_hard(distances: Array, positive: Array, negative: Array) -> Masks:
    """Keeps every anchor's farthest positive and nearest negative; of equal ones all.

    Hermans, Beyer & Leibe 2017, https://arxiv.org/abs/1703.07737, equation 5.

    >>> batch_hard(jnp.array([[1.0, 2.0]]), jnp.ones((1, 2), bool), jnp.zeros((1, 2), bool))[0]
    Array([[False,  True]], dtype=bool)
    """
    farthest, nearest = hardest(distances, positive, negative)
    return positive & (distances == farthest[:, None]), negative & (distances == nearest[:, None])


def semi_hard(distances: Array, positive: Array, negative: Array) -> Masks:
    """Keeps for every positive the nearest negative beyond it, and all positives.

    Schroff, Kalenichenko & Philbin, CVPR 2015, https://arxiv.org/abs/1503.03832, section 3.2;
    where no negative is farther than the positive, the farthest one.

    >>> distances, first = jnp.array([[2.0, 1.0, 3.0]]), jnp.array([[True, False, False]])
    >>> semi_hard(distances, first, ~first)[1].tolist()
    [[False, False, True]]
    """
    return positive, negative & _chosen(semi_hard_negatives(distances, negative), positive)


def semi_hard_negatives(distances: Array, negative: Array) -> Array:
    """[B, N] columns: for every pair, taken for a positive one, its semi-hard negative."""
    of_negatives = jnp.where(negative, distances, jnp.inf)
    order = jnp.argsort(of_negatives, 1)
    ordered = jnp.take_along_axis(of_negatives, order, 1)
    beyond = jax.vmap(lambda row, d: jnp.searchsorted(row, d, side="right"))(ordered, distances)
    last = jnp.maximum(negative.sum(1, keepdims=True) - 1, 0)
    return jnp.take_along_axis(order, jnp.minimum(beyond, last), 1)


def distance_weighted(
    distances: Array,
    positive: Array,
    negative: Array,
    *,
    key: Array,
    dim: int = 128,
    cutoff: float = 0.5,
    nonzero_cutoff: float = 1.4,
) -> Masks:
    """Draws for every positive a negative, near and far ones equally often.

    Wu et al., ICCV 2017, https://arxiv.org/abs/1706.07567, section 4: with a probability of one
    over the density of distances between random points on the sphere in `dim` dimensions,
    ``d^(n-2) (1 - d²/4)^((n-3)/2)``. An anchor has as many negatives as positives, but for those
    that were drawn twice. Distances below `cutoff` are taken for it, so that noise is not drawn
    too often; negatives beyond `nonzero_cutoff` are drawn where an anchor has no other.

    >>> distances, first = jnp.array([[1.0, 1.0, 2.0]]), jnp.array([[True, False, False]])
    >>> distance_weighted(distances, first, ~first, key=jax.random.key(0))[1].tolist()
    [[False, True, False]]
    """
    clipped = jnp.clip(distances, cutoff, 2 - 1e-3)
    log_density = (dim - 2) * jnp.log(clipped) + (dim - 3) / 2 * jnp.log(1 - clipped**2 / 4)
    near = negative & (distances < nonzero_cutoff)
    allowed = jnp.where(near.any(1, keepdims=True), near, negative)
    logits = jnp.where(allowed, -log_density, -jnp.inf)
    logits = jnp.where(allowed.any(1, keepdims=True), logits, 0.0)  # the mask below drops them
    # By the inverse of the distribution: `jax.random.categorical` would hold [B, N, N] numbers,
    # which are 34 GB for a batch of 128 with a memory of 8,192.
    cumulative = jnp.cumsum(jax.nn.softmax(logits, 1), 1)
    drawn = jax.random.uniform(key, distances.shape) * cumulative[:, -1:]
    columns = jax.vmap(lambda row, u: jnp.searchsorted(row, u, side="right"))(cumulative, drawn)
    columns = jnp.minimum(columns, distances.shape[1] - 1)
    return positive, negative & _chosen(columns, positive)


def _chosen(columns: Array, positive: Array) -> Array:
    """[B, N] bool: whether a column is among those that the positives of its row have chosen."""
    rows = jnp.arange(len(columns))[:, None]
    return jnp.zeros_like(positive).at[rows, columns].max(positive)


# The names under which configs select a miner.
MINERS: dict[str, Callable[..., Masks]] = {
    "batch_all": lambda distances, positive, negative: (positive, negative),
    "batch_hard": batch_hard,
    "semi_hard": semi_hard,
    "distance_weighted": distance_weighted,
}
