"""Ranking losses on embeddings, and the auxiliary classification loss.

A ranking loss takes ``embeddings [B, D]`` and ``labels [B]`` and returns a float32
scalar. What all of them keep to:

* The pairs and triplets of the whole batch are mined, so under `jax.jit` on a mesh
  the hardest negative may sit on any device.
* An anchor that has no other image of its class in the batch, or no image of
  another class, is left out of the mean; it counts neither as zero nor as
  infinity. A batch without any valid anchor gives 0.
* Distances are Euclidean, in float32, and gradients are finite even where
  embeddings coincide.

>>> embeddings, labels = jnp.eye(4), jnp.array([0, 0, 1, 1])  # all equally far apart
>>> for name, loss in RANKING_LOSSES.items():
...     print(f"{name} {loss(embeddings, labels):.2f}")
batch_hard_triplet 0.10
batch_all_triplet 0.10
semi_hard_triplet 0.10
contrastive 2.00
multi_similarity 0.66
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cgd_jax.combination import l2_normalize

__all__ = [
    "RANKING_LOSSES",
    "batch_all_triplet_loss",
    "batch_hard_triplet_loss",
    "contrastive_loss",
    "multi_similarity_loss",
    "pairwise_distances",
    "semi_hard_triplet_loss",
    "smoothed_cross_entropy",
]


def pairwise_distances(x: jax.Array, y: jax.Array | None = None) -> jax.Array:
    """Euclidean distances between all rows, safe to differentiate at zero.

    The root has an infinite slope at zero; here a distance of zero passes a zero
    gradient instead.

    Args:
      x: [N, D], floating point.
      y: [M, D]; `x` itself if left out.

    Returns:
      [N, M], float32.

    >>> pairwise_distances(jnp.array([[0.0, 0.0], [3.0, 4.0]])).tolist()
    [[0.0, 5.0], [5.0, 0.0]]
    """
    x = x.astype(jnp.float32)
    y = x if y is None else y.astype(jnp.float32)
    # Seen from their mean: |x|² + |y|² - 2 x·y of long vectors that lie close together has no
    # digit of their distance in it.
    center = jax.lax.stop_gradient(x.mean(0))
    x, y = x - center, y - center
    # Full precision: the default on GPU and TPU keeps 10 or 8 bits of mantissa, and
    # near neighbours differ by less than that.
    product = jnp.dot(x, y.T, precision=jax.lax.Precision.HIGHEST)
    squared = jnp.sum(x**2, 1)[:, None] + jnp.sum(y**2, 1)[None, :] - 2 * product
    is_zero = squared <= 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, squared)))


def batch_hard_triplet_loss(
    embeddings: jax.Array, labels: jax.Array, margin: float = 0.1
) -> jax.Array:
    """Triplet loss of every anchor's farthest positive and nearest negative.

    Hermans, Beyer & Leibe 2017, https://arxiv.org/abs/1703.07737, equation 5; the
    ranking loss of CGD (section 3.1). The mean over the valid anchors of
    ``max(0, max_p d(a, p) - min_n d(a, n) + margin)``.

    Args:
      embeddings: [B, D], floating point.
      labels: [B], integer class numbers.
      margin: in units of distance.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: wrong ranks, lengths or dtypes.

    >>> x, labels = jnp.array([[0.0], [3.0], [1.0], [7.0]]), jnp.array([0, 0, 1, 1])
    >>> print(f"{batch_hard_triplet_loss(x, labels):.2f}")  # (2.1 + 1.1 + 5.1 + 2.1) / 4
    2.60
    """
    positive, negative = _pair_masks(embeddings, labels)
    distances = pairwise_distances(embeddings)
    hardest_positive = jnp.where(positive, distances, -jnp.inf).max(1)
    hardest_negative = jnp.where(negative, distances, jnp.inf).min(1)
    valid = positive.any(1) & negative.any(1)
    # Replaced before the subtraction: inf - inf would poison the gradient.
    gap = jnp.where(valid, hardest_positive, 0.0) - jnp.where(valid, hardest_negative, 0.0)
    return _masked_mean(jax.nn.relu(gap + margin), valid)


def batch_all_triplet_loss(
    embeddings: jax.Array, labels: jax.Array, margin: float = 0.1
) -> jax.Array:
    """Triplet loss of all triplets, averaged over those that violate the margin.

    Hermans, Beyer & Leibe 2017, https://arxiv.org/abs/1703.07737, equation 6 in the
    variant with the mean over the non-zero terms (their "BA≠0"): easy triplets soon
    outnumber all others and would drown the rest. Memory grows with B², not B³.

    Args:
      embeddings: [B, D], floating point.
      labels: [B], integer class numbers.
      margin: in units of distance.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: wrong ranks, lengths or dtypes.

    >>> x, labels = jnp.array([[0.0], [1.0], [5.0], [6.0]]), jnp.array([0, 0, 1, 1])
    >>> batch_all_triplet_loss(x, labels, margin=4.0).item()  # two of eight violate it, by 1
    1.0
    """
    positive, negative = _pair_masks(embeddings, labels)
    distances = pairwise_distances(embeddings)

    @jax.checkpoint  # else the backward pass keeps B matrices of B × B
    def anchor(row):
        distance, is_positive, is_negative = row
        violation = distance[:, None] - distance[None, :] + margin
        active = is_positive[:, None] & is_negative[None, :] & (violation > 0)
        return jnp.where(active, violation, 0.0).sum(), active.sum()

    totals, counts = jax.lax.map(anchor, (distances, positive, negative))
    return totals.sum() / jnp.maximum(counts.sum(), 1)


def semi_hard_triplet_loss(
    embeddings: jax.Array, labels: jax.Array, margin: float = 0.1
) -> jax.Array:
    """Triplet loss with the nearest negative that is farther than the positive.

    Schroff, Kalenichenko & Philbin, CVPR 2015, https://arxiv.org/abs/1503.03832,
    section 3.2. For every (anchor, positive) pair the negative is the nearest of
    those farther away than the positive; where no negative is, the farthest one.
    The mean over all pairs of valid anchors.

    Args:
      embeddings: [B, D], floating point.
      labels: [B], integer class numbers.
      margin: in units of distance.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: wrong ranks, lengths or dtypes.

    >>> x, labels = jnp.array([[0.0], [3.0], [1.0], [7.0]]), jnp.array([0, 0, 1, 1])
    >>> print(f"{semi_hard_triplet_loss(x, labels):.3f}")  # 1 to 7: 6 - 2 + 0.1, others 0
    1.025
    """
    positive, negative = _pair_masks(embeddings, labels)
    distances = pairwise_distances(embeddings)
    negatives = jnp.sort(jnp.where(negative, distances, jnp.inf), 1)
    farther = jax.vmap(lambda row, d: jnp.searchsorted(row, d, side="right"))(negatives, distances)
    farthest = jnp.maximum(negative.sum(1, keepdims=True) - 1, 0)
    chosen = jnp.take_along_axis(negatives, jnp.minimum(farther, farthest), 1)
    valid = positive & negative.any(1, keepdims=True)
    gap = jnp.where(valid, distances, 0.0) - jnp.where(valid, chosen, 0.0)
    return _masked_mean(jax.nn.relu(gap + margin), valid)


def contrastive_loss(embeddings: jax.Array, labels: jax.Array, margin: float = 1.0) -> jax.Array:
    """Pulls pairs of one class together and pushes others a margin apart.

    Hadsell, Chopra & LeCun, CVPR 2006, https://doi.org/10.1109/CVPR.2006.100:
    ``d²`` for a positive pair, ``max(0, margin - d)²`` for a negative one. Each
    valid anchor contributes the mean over its positives plus the mean over its
    negatives, so that the few positives of a batch weigh as much as its many
    negatives.

    Args:
      embeddings: [B, D], floating point.
      labels: [B], integer class numbers.
      margin: in units of distance; unit vectors at right angles are 1.41 apart.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: wrong ranks, lengths or dtypes.

    >>> x, labels = jnp.array([[0.0], [1.0], [9.0], [9.0]]), jnp.array([0, 0, 1, 1])
    >>> contrastive_loss(x, labels).item()  # two anchors pull by 1, two by 0, none pushes
    0.5
    """
    positive, negative = _pair_masks(embeddings, labels)
    distances = pairwise_distances(embeddings)
    valid = positive.any(1) & negative.any(1)
    pull = _masked_mean(distances**2, positive, 1)
    push = _masked_mean(jax.nn.relu(margin - distances) ** 2, negative, 1)
    return _masked_mean(pull + push, valid)


def multi_similarity_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    mining_margin: float = 0.1,
) -> jax.Array:
    """Weights pairs by their own and their relative similarities.

    Wang et al., CVPR 2019, https://arxiv.org/abs/1904.06627, equations 12 to 15. A
    negative is mined when it is more similar than the least similar positive less
    `mining_margin`, a positive when it is less similar than the most similar
    negative plus `mining_margin`.

    Args:
      embeddings: [B, D], floating point; compared by cosine.
      labels: [B], integer class numbers.
      alpha: sharpness for positives.
      beta: sharpness for negatives.
      base: λ, the similarity at which a pair changes from pushed to pulled.
      mining_margin: ε of the mining step; in units of cosine similarity.

    Returns:
      A float32 scalar: the mean over valid anchors; one whose pairs are all easy
      counts as 0.

    Raises:
      ValueError: wrong ranks, lengths or dtypes.

    >>> x, labels = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), jnp.array([0, 0, 1])
    >>> multi_similarity_loss(x, labels).item()  # no pair violates the mining margin
    0.0
    """
    positive, negative = _pair_masks(embeddings, labels)
    unit = l2_normalize(embeddings.astype(jnp.float32))
    similarity = jnp.dot(unit, unit.T, precision=jax.lax.Precision.HIGHEST)
    least_positive = jnp.where(positive, similarity, jnp.inf).min(1, keepdims=True)
    most_negative = jnp.where(negative, similarity, -jnp.inf).max(1, keepdims=True)
    mined_positive = positive & (similarity - mining_margin < most_negative)
    mined_negative = negative & (similarity + mining_margin > least_positive)

    def soft_sum(exponent, mask):
        # log(1 + Σ exp) over the mask, without overflow: the 1 is an added zero.
        masked = jnp.where(mask, exponent, -jnp.inf)
        return jax.nn.logsumexp(jnp.pad(masked, ((0, 0), (0, 1))), 1)

    pull = soft_sum(-alpha * (similarity - base), mined_positive) / alpha
    push = soft_sum(beta * (similarity - base), mined_negative) / beta
    return _masked_mean(pull + push, positive.any(1) & negative.any(1))


def smoothed_cross_entropy(
    logits: jax.Array, labels: jax.Array, temperature: float = 0.5, smoothing: float = 0.1
) -> jax.Array:
    """Softmax cross-entropy with temperature scaling and label smoothing.

    The auxiliary loss of CGD (section 3.2), with the label smoothing of Szegedy et
    al., https://arxiv.org/abs/1512.00567: the target is ``1 - smoothing`` on the
    true class plus ``smoothing / M`` on each of all M classes.

    Args:
      logits: [B, M], floating point, before the temperature.
      labels: [B], integers in [0, M).
      temperature: τ > 0, by which the logits are divided; below 1 it sharpens.
      smoothing: ε in [0, 1).

    Returns:
      A float32 scalar, the mean over the batch.

    Raises:
      ValueError: wrong ranks, lengths or dtypes; temperature or smoothing out of
        range.

    >>> logits, labels = jnp.array([[2.0, 0.0]]), jnp.array([0])
    >>> loss = smoothed_cross_entropy(logits, labels, temperature=0.5, smoothing=0.1)
    >>> print(f"{loss:.4f}")  # softmax of [4, 0] against the target [0.95, 0.05]
    0.2181
    """
    _check(logits, labels, "logits")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}.")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1); got {smoothing}.")
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    true_class = jnp.take_along_axis(log_probabilities, labels[:, None], 1)[:, 0]
    return -jnp.mean((1 - smoothing) * true_class + smoothing * log_probabilities.mean(1))


def _pair_masks(embeddings: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Boolean [B, B]: same class but another image; another class."""
    _check(embeddings, labels, "embeddings")
    same = labels[:, None] == labels[None, :]
    return same & ~jnp.eye(len(labels), dtype=bool), ~same


def _masked_mean(values: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
    """The mean of `values` where `mask`; 0 where the mask is empty."""
    return jnp.where(mask, values, 0.0).sum(axis) / jnp.maximum(mask.sum(axis), 1)


def _check(values: jax.Array, labels: jax.Array, name: str) -> None:
    if values.ndim != 2 or labels.shape != values.shape[:1]:
        raise ValueError(
            f"{name} must have shape [B, ...] of rank 2 and labels [B]; got {name} "
            f"{values.shape} and labels {labels.shape}."
        )
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point; got {values.dtype}.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers; got {labels.dtype}.")


# The names under which configs select a ranking loss.
RANKING_LOSSES: dict[str, Callable[..., jax.Array]] = {
    "batch_hard_triplet": batch_hard_triplet_loss,
    "batch_all_triplet": batch_all_triplet_loss,
    "semi_hard_triplet": semi_hard_triplet_loss,
    "contrastive": contrastive_loss,
    "multi_similarity": multi_similarity_loss,
}
