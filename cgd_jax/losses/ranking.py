"""Ranking losses on the pairs and the triplets of a batch.

All of them take and return the same, and differ in the hyper-parameters that each describes:

* `embeddings [B, D]`, floating point, and `labels [B]`, integer class numbers, give a float32
  scalar, the mean over the valid anchors unless another is named.
* `margin` is in units of distance; a `temperature`, above 0, is what cosines are divided by.
* Of the keyword arguments `memory` (`pairs.Memory`) adds embeddings of earlier batches to those
  that anchors are compared with, and `miner` (see `miners`) chooses the pairs that are looked at.
* The pairs and triplets of the whole batch are compared, so under `jax.jit` on a mesh the
  hardest negative may sit on any device.
* An anchor that has no other image of its class, or no image of another class, is not valid: it
  is left out of the mean and counts neither as zero nor as infinity. A batch without any valid
  anchor gives 0.
* Everything is float32. Gradients are finite even where embeddings coincide, are zero or longer
  than 1e20. An embedding that is not finite makes the loss NaN.
* ValueError is raised for wrong ranks, lengths or dtypes.
"""

from collections.abc import Callable
from typing import Unpack

import jax
import jax.numpy as jnp
from jax import Array

from cgd_jax.losses.miners import hardest, semi_hard_negatives
from cgd_jax.losses.pairs import (
    LIMIT,
    Memory,
    Miner,
    PairOptions,
    batch_mean,
    checked,
    masked_logsumexp,
    masked_mean,
    nan_unless_finite,
    pairs_of,
    soft_sum,
)

__all__ = [
    "PAIR_LOSSES",
    "batch_all_triplet_loss",
    "batch_hard_triplet_loss",
    "circle_loss",
    "contrastive_loss",
    "info_nce_loss",
    "lifted_structure_loss",
    "multi_similarity_loss",
    "semi_hard_triplet_loss",
    "soft_margin_triplet_loss",
    "supervised_contrastive_loss",
]

BLOCK = 2**24  # pairs whose distances triplet losses of the hardest ones hold at a time


def batch_hard_triplet_loss(
    embeddings: Array, labels: Array, margin: float = 0.1, **options: Unpack[PairOptions]
) -> Array:
    """Triplet loss of every anchor's farthest positive and nearest negative.

    Hermans, Beyer & Leibe 2017, https://arxiv.org/abs/1703.07737, equation 5; the
    ranking loss of CGD (section 3.1): ``max(0, max_p d(a, p) - min_n d(a, n) + margin)``.

    >>> x, labels = jnp.array([[0.0], [3.0], [1.0], [7.0]]), jnp.array([0, 0, 1, 1])
    >>> print(f"{batch_hard_triplet_loss(x, labels):.2f}")  # (2.1 + 1.1 + 5.1 + 2.1) / 4
    2.60
    """
    gap, valid = _hardest_gap(embeddings, labels, **options)
    return batch_mean(jax.nn.relu(gap + margin), valid, embeddings)


def soft_margin_triplet_loss(
    embeddings: Array, labels: Array, scale: float = 1.0, **options: Unpack[PairOptions]
) -> Array:
    """Triplet loss of the hardest pairs with a softplus in place of the hinge.

    Hermans, Beyer & Leibe 2017, https://arxiv.org/abs/1703.07737, section 2.1:
    ``log(1 + exp(max_p d(a, p) - min_n d(a, n)))``. It has no margin beyond which a triplet
    counts as solved. `scale` multiplies the difference, which of unit vectors is at most 2.

    >>> x, labels = jnp.array([[0.0], [1.0], [1.0], [2.0]]), jnp.array([0, 0, 1, 1])
    >>> print(f"{soft_margin_triplet_loss(x, labels):.4f}")  # softplus of 0, 1, 1, 0
    1.0032
    """
    gap, valid = _hardest_gap(embeddings, labels, **options)
    return batch_mean(jax.nn.softplus(scale * gap), valid, embeddings)


def batch_all_triplet_loss(
    embeddings: Array, labels: Array, margin: float = 0.1, **options: Unpack[PairOptions]
) -> Array:
    """Triplet loss of all triplets, averaged over those that violate the margin.

    Hermans, Beyer & Leibe 2017, https://arxiv.org/abs/1703.07737, equation 6, their "BA≠0": easy
    triplets soon outnumber all others and would drown the rest. Memory grows with B², not B³.

    >>> x, labels = jnp.array([[0.0], [1.0], [5.0], [6.0]]), jnp.array([0, 0, 1, 1])
    >>> batch_all_triplet_loss(x, labels, margin=4.0).item()  # two of eight violate it, by 1
    1.0
    """
    pairs = pairs_of(embeddings, labels, **options)

    @jax.checkpoint  # else the backward pass keeps B matrices of B × B
    def anchor(row):
        distance, is_positive, is_negative = row
        violation = distance[:, None] - distance[None, :] + margin
        active = is_positive[:, None] & is_negative[None, :] & (violation > 0)
        return jnp.where(active, violation, 0.0).sum(), active.sum()

    totals, counts = jax.lax.map(anchor, (pairs.distances, pairs.positive, pairs.negative))
    return nan_unless_finite(embeddings, totals.sum() / jnp.maximum(counts.sum(), 1))


def semi_hard_triplet_loss(
    embeddings: Array, labels: Array, margin: float = 0.1, **options: Unpack[PairOptions]
) -> Array:
    """Triplet loss with the nearest negative that is farther than the positive.

    Schroff, Kalenichenko & Philbin, CVPR 2015, https://arxiv.org/abs/1503.03832, section 3.2.
    Where no negative is farther, it is the farthest one. The mean over all pairs of valid anchors.

    >>> x, labels = jnp.array([[0.0], [3.0], [1.0], [7.0]]), jnp.array([0, 0, 1, 1])
    >>> print(f"{semi_hard_triplet_loss(x, labels):.3f}")  # 1 to 7: 6 - 2 + 0.1, others 0
    1.025
    """
    pairs = pairs_of(embeddings, labels, **options)
    distances, valid = pairs.distances, pairs.positive & pairs.valid[:, None]
    columns = semi_hard_negatives(jax.lax.stop_gradient(distances), pairs.negative)
    chosen = jnp.take_along_axis(distances, columns, 1)
    return batch_mean(jax.nn.relu(distances - chosen + margin), valid, embeddings)


def contrastive_loss(
    embeddings: Array, labels: Array, margin: float = 1.0, **options: Unpack[PairOptions]
) -> Array:
    """Pulls pairs of one class together and pushes others a margin apart.

    Hadsell, Chopra & LeCun, CVPR 2006, https://doi.org/10.1109/CVPR.2006.100: ``d²`` for a positive
    pair, ``max(0, margin - d)²`` for a negative one. Each valid anchor contributes the mean over
    its positives plus that over its negatives, so that few positives weigh as much as many
    negatives. Unit vectors at right angles are 1.41 apart.

    >>> x, labels = jnp.array([[0.0], [1.0], [9.0], [9.0]]), jnp.array([0, 0, 1, 1])
    >>> contrastive_loss(x, labels).item()  # two anchors pull by 1, two by 0, none pushes
    0.5
    """
    pairs = pairs_of(embeddings, labels, **options)
    distances = jnp.minimum(pairs.distances, LIMIT)
    pull = masked_mean(distances**2, pairs.positive, 1)
    push = masked_mean(jax.nn.relu(margin - distances) ** 2, pairs.negative, 1)
    return batch_mean(pull + push, pairs.valid, embeddings)


def multi_similarity_loss(
    embeddings: Array,
    labels: Array,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    mining_margin: float = 0.1,
    **options: Unpack[PairOptions],
) -> Array:
    """Weights pairs by their own and their relative similarities (cosines).

    Wang et al., CVPR 2019, https://arxiv.org/abs/1904.06627, equations 12 to 15. Negatives more
    similar than the least similar positive less `mining_margin`, the paper's ε, are mined, and
    positives less similar than the most similar negative plus it. The mean is over all images of
    the batch; those without a mined pair, such as the only one of its class, count as 0. `alpha`
    and `beta` are the sharpness for positives and negatives, `base`, λ, is the similarity at which
    a pair changes from pushed to pulled.

    >>> x, labels = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), jnp.array([0, 0, 1])
    >>> multi_similarity_loss(x, labels).item()  # no pair violates the mining margin
    0.0
    """
    pairs = pairs_of(embeddings, labels, **options)
    similarity = pairs.similarities
    farthest, nearest = hardest(-similarity, pairs.positive, pairs.negative)
    mined_positive = pairs.positive & (similarity - mining_margin < -nearest[:, None])
    mined_negative = pairs.negative & (similarity + mining_margin > -farthest[:, None])
    pull = soft_sum(-alpha * (similarity - base), mined_positive) / alpha
    push = soft_sum(beta * (similarity - base), mined_negative) / beta
    return nan_unless_finite(embeddings, (pull + push).mean())


def info_nce_loss(
    embeddings: Array, labels: Array, temperature: float = 0.07, **options: Unpack[PairOptions]
) -> Array:
    """Cross-entropy of each positive against all negatives of its anchor (NT-Xent).

    Oord, Li & Vinyals 2018, https://arxiv.org/abs/1807.03748, equation 4, with the scaled cosine
    of Chen et al. 2020, https://arxiv.org/abs/2002.05709. A positive is compared with the negatives
    alone, not with other positives. The mean over all positive pairs.

    >>> print(f"{info_nce_loss(jnp.eye(4), jnp.array([0, 0, 1, 1])):.4f}")  # log 3
    1.0986
    """
    pairs = pairs_of(embeddings, labels, **options)
    logits = pairs.similarities / temperature
    cost = jax.nn.softplus(masked_logsumexp(logits, pairs.negative)[:, None] - logits)
    return batch_mean(cost, pairs.positive & pairs.valid[:, None], embeddings)


def supervised_contrastive_loss(
    embeddings: Array, labels: Array, temperature: float = 0.1, **options: Unpack[PairOptions]
) -> Array:
    """SupCon: cross-entropy of each positive against all other images.

    Khosla et al., NeurIPS 2020, https://arxiv.org/abs/2004.11362, equation 2 (L_out, the mean over
    an anchor's positives outside of the logarithm).

    >>> print(f"{supervised_contrastive_loss(jnp.eye(4), jnp.array([0, 0, 1, 1])):.4f}")  # log 3
    1.0986
    """
    pairs = pairs_of(embeddings, labels, **options)
    logits = pairs.similarities / temperature
    everything = masked_logsumexp(logits, pairs.positive | pairs.negative)[:, None]
    return batch_mean(masked_mean(everything - logits, pairs.positive, 1), pairs.valid, embeddings)


def circle_loss(
    embeddings: Array,
    labels: Array,
    margin: float = 0.25,
    scale: float = 256.0,
    **options: Unpack[PairOptions],
) -> Array:
    """Weights every similarity (cosine) by how far it is from its optimum.

    Sun et al., CVPR 2020, https://arxiv.org/abs/2002.10857, equations 6 to 9: optima 1 + m and
    -m, margins 1 - m and m, m being `margin`; the weights pass no gradient. The defaults are the
    paper's for faces; for birds, cars and products it has m = 0.4 and a `scale` γ = 80.

    >>> x, labels = jnp.repeat(jnp.eye(2), 2, 0), jnp.array([0, 0, 1, 1])
    >>> print(f"{circle_loss(x, labels, scale=1.0):.4f}")  # log(1 + 2 exp(-0.0625) exp(-0.0625))
    1.0170
    """
    pairs = pairs_of(embeddings, labels, **options)
    similarity, valid = pairs.similarities, pairs.valid
    fixed = jax.lax.stop_gradient(similarity)
    pull = -scale * jax.nn.relu(1 + margin - fixed) * (similarity - (1 - margin))
    push = scale * jax.nn.relu(fixed + margin) * (similarity - margin)
    # Summed before the softplus only where both are there: two very low numbers stay finite.
    total = masked_logsumexp(pull, pairs.positive) + masked_logsumexp(push, pairs.negative)
    return batch_mean(jax.nn.softplus(jnp.where(valid, total, 0.0)), valid, embeddings)


def lifted_structure_loss(
    embeddings: Array, labels: Array, margin: float = 1.0, **options: Unpack[PairOptions]
) -> Array:
    """Pushes away all negatives of both images of every positive pair.

    Song et al., CVPR 2016, https://arxiv.org/abs/1511.06452, equation 4: half the mean over the
    positive pairs of ``max(0, d(i, j) + log(Σ_k exp(margin - d(i, k)) + Σ_l exp(margin - d(j,
    l))))²``, k and l running over the negatives of i and of j. Images in the memory have no
    negatives of their own.

    >>> print(f"{lifted_structure_loss(jnp.eye(4), jnp.array([0, 0, 1, 1])):.4f}")
    2.8472
    """
    pairs = pairs_of(embeddings, labels, **options)
    distances = jnp.minimum(pairs.distances, LIMIT)
    own = masked_logsumexp(margin - distances, pairs.negative)
    theirs = jnp.pad(own, (0, distances.shape[1] - len(own)), constant_values=-1e30)
    cost = jax.nn.relu(distances + jnp.logaddexp(own[:, None], theirs[None, :])) ** 2
    return batch_mean(cost, pairs.positive & pairs.valid[:, None], embeddings) / 2


def _hardest_gap(
    embeddings: Array, labels: Array, memory: Memory | None = None, miner: Miner | None = None
) -> tuple[Array, Array]:
    """[B] farthest positive less nearest negative, or 0; [B] whether an anchor is valid.

    Of more than `BLOCK` pairs it looks at some anchors after the other, forth and back, so that no
    device holds all of their distances: of 32,768 images they are 4 GB.
    """
    embeddings, labels = checked(embeddings, labels)

    def gap_of(block: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        pairs = pairs_of(embeddings, labels, memory, miner, block)
        farthest, nearest = hardest(pairs.distances, pairs.positive, pairs.negative)
        # Not the difference masked, since inf - inf poisons gradients.
        gap = jnp.where(pairs.valid, farthest, 0.0) - jnp.where(pairs.valid, nearest, 0.0)
        return gap, pairs.valid

    blocks, anchors = 1, len(labels)
    columns = anchors + (0 if memory is None else len(memory.labels))
    while anchors * columns > blocks * BLOCK and anchors % (2 * blocks) == 0:
        blocks *= 2
    batch = embeddings, labels, jnp.arange(anchors)
    if blocks == 1:
        return gap_of(batch)
    # Every n-th image makes a block, so that each device has its part of it.
    batch = jax.tree.map(lambda x: x.reshape(-1, blocks, *x.shape[1:]).swapaxes(0, 1), batch)
    gap, valid = jax.lax.map(jax.checkpoint(gap_of), batch)
    return gap.T.reshape(anchors), valid.T.reshape(anchors)


# The names under which configs select them; see `objective.measure_losses` for what they take.
PAIR_LOSSES: dict[str, Callable[..., Array]] = {
    "batch_hard_triplet": batch_hard_triplet_loss,
    "batch_all_triplet": batch_all_triplet_loss,
    "semi_hard_triplet": semi_hard_triplet_loss,
    "soft_margin_triplet": soft_margin_triplet_loss,
    "contrastive": contrastive_loss,
    "multi_similarity": multi_similarity_loss,
    "info_nce": info_nce_loss,
    "sup_con": supervised_contrastive_loss,
    "circle": circle_loss,
    "lifted_structure": lifted_structure_loss,
}
