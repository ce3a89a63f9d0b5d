"""Ranking losses: of the pairs, the triplets, or the order of a batch.

What all of them keep to:

* `embeddings [B, D]` and `labels [B]` give a float32 scalar.
* The pairs and triplets of the whole batch are compared, so under `jax.jit` on a mesh the
  hardest negative may sit on any device.
* An anchor that has no other image of its class, or no image of another class, is left out of
  the mean; it counts neither as zero nor as infinity. A batch without any valid anchor gives 0.
* Everything is float32, and gradients are finite even where embeddings coincide.
* ValueError is raised for wrong ranks, lengths or dtypes.

Those that take `memory` also compare with embeddings of earlier batches (`pairs.Memory`); those
that take `miner` look only at the pairs that it keeps (see `miners`).
"""

import jax
import jax.numpy as jnp

from cgd_jax.combination import l2_normalize
from cgd_jax.losses.pairs import (
    Memory,
    Miner,
    check,
    masked_logsumexp,
    masked_mean,
    pairs_of,
    pairwise_distances,
    products,
    similarities,
    soft_sum,
)

__all__ = [
    "batch_all_triplet_loss",
    "batch_hard_triplet_loss",
    "circle_loss",
    "contrastive_loss",
    "info_nce_loss",
    "lifted_structure_loss",
    "multi_similarity_loss",
    "n_pair_loss",
    "recall_at_k_loss",
    "semi_hard_triplet_loss",
    "smooth_ap_loss",
    "soft_margin_triplet_loss",
    "supervised_contrastive_loss",
]


def batch_hard_triplet_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    margin: float = 0.1,
    *,
    memory: Memory | None = None,
    miner: Miner | None = None,
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

    >>> x, labels = jnp.array([[0.0], [3.0], [1.0], [7.0]]), jnp.array([0, 0, 1, 1])
    >>> print(f"{batch_hard_triplet_loss(x, labels):.2f}")  # (2.1 + 1.1 + 5.1 + 2.1) / 4
    2.60
    """
    references, positive, negative = pairs_of(embeddings, labels, memory, miner)
    distances = pairwise_distances(embeddings, references)
    hardest_positive = jnp.where(positive, distances, -jnp.inf).max(1)
    hardest_negative = jnp.where(negative, distances, jnp.inf).min(1)
    valid = positive.any(1) & negative.any(1)
    # Replaced before the subtraction: inf - inf would poison the gradient.
    gap = jnp.where(valid, hardest_positive, 0.0) - jnp.where(valid, hardest_negative, 0.0)
    return masked_mean(jax.nn.relu(gap + margin), valid)


def batch_all_triplet_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    margin: float = 0.1,
    *,
    memory: Memory | None = None,
    miner: Miner | None = None,
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

    >>> x, labels = jnp.array([[0.0], [1.0], [5.0], [6.0]]), jnp.array([0, 0, 1, 1])
    >>> batch_all_triplet_loss(x, labels, margin=4.0).item()  # two of eight violate it, by 1
    1.0
    """
    references, positive, negative = pairs_of(embeddings, labels, memory, miner)
    distances = pairwise_distances(embeddings, references)

    @jax.checkpoint  # else the backward pass keeps B matrices of B × B
    def anchor(row):
        distance, is_positive, is_negative = row
        violation = distance[:, None] - distance[None, :] + margin
        active = is_positive[:, None] & is_negative[None, :] & (violation > 0)
        return jnp.where(active, violation, 0.0).sum(), active.sum()

    totals, counts = jax.lax.map(anchor, (distances, positive, negative))
    return totals.sum() / jnp.maximum(counts.sum(), 1)


def semi_hard_triplet_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    margin: float = 0.1,
    *,
    memory: Memory | None = None,
    miner: Miner | None = None,
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

    >>> x, labels = jnp.array([[0.0], [3.0], [1.0], [7.0]]), jnp.array([0, 0, 1, 1])
    >>> print(f"{semi_hard_triplet_loss(x, labels):.3f}")  # 1 to 7: 6 - 2 + 0.1, others 0
    1.025
    """
    references, positive, negative = pairs_of(embeddings, labels, memory, miner)
    distances = pairwise_distances(embeddings, references)
    negatives = jnp.sort(jnp.where(negative, distances, jnp.inf), 1)
    farther = jax.vmap(lambda row, d: jnp.searchsorted(row, d, side="right"))(negatives, distances)
    farthest = jnp.maximum(negative.sum(1, keepdims=True) - 1, 0)
    chosen = jnp.take_along_axis(negatives, jnp.minimum(farther, farthest), 1)
    valid = positive & negative.any(1, keepdims=True)
    gap = jnp.where(valid, distances, 0.0) - jnp.where(valid, chosen, 0.0)
    return masked_mean(jax.nn.relu(gap + margin), valid)


def contrastive_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    margin: float = 1.0,
    *,
    memory: Memory | None = None,
    miner: Miner | None = None,
) -> jax.Array:
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

    >>> x, labels = jnp.array([[0.0], [1.0], [9.0], [9.0]]), jnp.array([0, 0, 1, 1])
    >>> contrastive_loss(x, labels).item()  # two anchors pull by 1, two by 0, none pushes
    0.5
    """
    references, positive, negative = pairs_of(embeddings, labels, memory, miner)
    distances = pairwise_distances(embeddings, references)
    valid = positive.any(1) & negative.any(1)
    pull = masked_mean(distances**2, positive, 1)
    push = masked_mean(jax.nn.relu(margin - distances) ** 2, negative, 1)
    return masked_mean(pull + push, valid)


def multi_similarity_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    mining_margin: float = 0.1,
    *,
    memory: Memory | None = None,
    miner: Miner | None = None,
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

    >>> x, labels = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), jnp.array([0, 0, 1])
    >>> multi_similarity_loss(x, labels).item()  # no pair violates the mining margin
    0.0
    """
    references, positive, negative = pairs_of(embeddings, labels, memory, miner)
    similarity = similarities(embeddings, references)
    least_positive = jnp.where(positive, similarity, jnp.inf).min(1, keepdims=True)
    most_negative = jnp.where(negative, similarity, -jnp.inf).max(1, keepdims=True)
    mined_positive = positive & (similarity - mining_margin < most_negative)
    mined_negative = negative & (similarity + mining_margin > least_positive)

    pull = soft_sum(-alpha * (similarity - base), mined_positive) / alpha
    push = soft_sum(beta * (similarity - base), mined_negative) / beta
    return masked_mean(pull + push, positive.any(1) & negative.any(1))


def soft_margin_triplet_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    scale: float = 1.0,
    *,
    memory: Memory | None = None,
    miner: Miner | None = None,
) -> jax.Array:
    """Triplet loss of the hardest pairs with a softplus in place of the hinge.

    Hermans, Beyer & Leibe 2017, https://arxiv.org/abs/1703.07737, section 2.1: the mean over
    the valid anchors of ``log(1 + exp(max_p d(a, p) - min_n d(a, n)))``. It has no margin beyond
    which a triplet counts as solved.

    Args:
      embeddings: [B, D], floating point.
      labels: [B], integer class numbers.
      scale: factor of the difference, 1 in the paper; distances of unit vectors are below 2.
      memory: see the module.
      miner: see the module.

    Returns:
      A float32 scalar.

    >>> x, labels = jnp.array([[0.0], [1.0], [1.0], [2.0]]), jnp.array([0, 0, 1, 1])
    >>> print(f"{soft_margin_triplet_loss(x, labels):.4f}")  # softplus of 0, 1, 1, 0
    1.0032
    """
    references, positive, negative = pairs_of(embeddings, labels, memory, miner)
    distances = pairwise_distances(embeddings, references)
    valid = positive.any(1) & negative.any(1)
    farthest = jnp.where(positive, distances, -jnp.inf).max(1)
    nearest = jnp.where(negative, distances, jnp.inf).min(1)
    gap = jnp.where(valid, farthest, 0.0) - jnp.where(valid, nearest, 0.0)
    return masked_mean(jax.nn.softplus(scale * gap), valid)


def info_nce_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    temperature: float = 0.07,
    *,
    memory: Memory | None = None,
    miner: Miner | None = None,
) -> jax.Array:
    """Cross-entropy of each positive against all negatives of its anchor (NT-Xent).

    Oord, Li & Vinyals 2018, https://arxiv.org/abs/1807.03748, equation 4, with the scaled cosine
    of Chen et al. 2020, https://arxiv.org/abs/2002.05709. Where a class has more than two images
    every positive is compared with the negatives alone, not with the other positives. The mean
    over all positive pairs.

    Args:
      embeddings: [B, D], floating point; compared by cosine.
      labels: [B], integer class numbers.
      temperature: above 0.
      memory: see the module.
      miner: see the module.

    Returns:
      A float32 scalar.

    >>> print(f"{info_nce_loss(jnp.eye(4), jnp.array([0, 0, 1, 1])):.4f}")  # log 3
    1.0986
    """
    references, positive, negative = pairs_of(embeddings, labels, memory, miner)
    logits = similarities(embeddings, references) / temperature
    others = masked_logsumexp(logits, negative)[:, None]
    return masked_mean(jax.nn.softplus(others - logits), positive & negative.any(1, keepdims=True))


def supervised_contrastive_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    temperature: float = 0.1,
    *,
    memory: Memory | None = None,
    miner: Miner | None = None,
) -> jax.Array:
    """SupCon: cross-entropy of each positive against all other images.

    Khosla et al., NeurIPS 2020, https://arxiv.org/abs/2004.11362, equation 2 (L_out, the mean over
    an anchor's positives outside of the logarithm); the mean over the valid anchors.

    Args:
      embeddings: [B, D], floating point; compared by cosine.
      labels: [B], integer class numbers.
      temperature: above 0.
      memory: see the module.
      miner: see the module.

    Returns:
      A float32 scalar.

    >>> print(f"{supervised_contrastive_loss(jnp.eye(4), jnp.array([0, 0, 1, 1])):.4f}")  # log 3
    1.0986
    """
    references, positive, negative = pairs_of(embeddings, labels, memory, miner)
    logits = similarities(embeddings, references) / temperature
    everything = masked_logsumexp(logits, positive | negative)[:, None]
    valid = positive.any(1) & negative.any(1)
    return masked_mean(masked_mean(everything - logits, positive, 1), valid)


def circle_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    margin: float = 0.25,
    scale: float = 256.0,
    *,
    memory: Memory | None = None,
    miner: Miner | None = None,
) -> jax.Array:
    """Weights every similarity by how far it is from its optimum.

    Sun et al., CVPR 2020, https://arxiv.org/abs/2002.10857, equations 6 to 9: optima 1 + m and
    -m, margins 1 - m and m; the weights pass no gradient. The defaults are the paper's for faces;
    for birds, cars and products it has m = 0.4, γ = 80.

    Args:
      embeddings: [B, D], floating point; compared by cosine.
      labels: [B], integer class numbers.
      margin: m, the relaxation.
      scale: γ.
      memory: see the module.
      miner: see the module.

    Returns:
      A float32 scalar, the mean over the valid anchors.

    >>> x, labels = jnp.repeat(jnp.eye(2), 2, 0), jnp.array([0, 0, 1, 1])
    >>> print(f"{circle_loss(x, labels, scale=1.0):.4f}")  # log(1 + 2 exp(-0.0625) exp(-0.0625))
    1.0170
    """
    references, positive, negative = pairs_of(embeddings, labels, memory, miner)
    similarity = similarities(embeddings, references)
    fixed = jax.lax.stop_gradient(similarity)
    pull = -scale * jax.nn.relu(1 + margin - fixed) * (similarity - (1 - margin))
    push = scale * jax.nn.relu(fixed + margin) * (similarity - margin)
    valid = positive.any(1) & negative.any(1)
    # Summed before the softplus only where both are there: two very low numbers stay finite.
    total = masked_logsumexp(pull, positive) + masked_logsumexp(push, negative)
    return masked_mean(jax.nn.softplus(jnp.where(valid, total, 0.0)), valid)


def lifted_structure_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    margin: float = 1.0,
    *,
    memory: Memory | None = None,
    miner: Miner | None = None,
) -> jax.Array:
    """Pushes away all negatives of both images of every positive pair.

    Song et al., CVPR 2016, https://arxiv.org/abs/1511.06452, equation 4: half the mean over the
    positive pairs of ``max(0, d(i, j) + log(Σ_k exp(margin - d(i, k)) + Σ_l exp(margin - d(j,
    l))))²``, k and l running over the negatives of i and of j. Images in the memory have no
    negatives of their own.

    Args:
      embeddings: [B, D], floating point.
      labels: [B], integer class numbers.
      margin: in units of distance.
      memory: see the module.
      miner: see the module.

    Returns:
      A float32 scalar.

    >>> print(f"{lifted_structure_loss(jnp.eye(4), jnp.array([0, 0, 1, 1])):.4f}")
    2.8472
    """
    references, positive, negative = pairs_of(embeddings, labels, memory, miner)
    distances = pairwise_distances(embeddings, references)
    own = masked_logsumexp(margin - distances, negative)
    theirs = jnp.pad(own, (0, len(references) - len(own)), constant_values=-1e30)
    cost = jax.nn.relu(distances + jnp.logaddexp(own[:, None], theirs[None, :])) ** 2
    return masked_mean(cost, positive & negative.any(1, keepdims=True)) / 2


def n_pair_loss(embeddings: jax.Array, labels: jax.Array, scale: float = 16.0) -> jax.Array:
    """Cross-entropy of one positive a class against the positives of all other classes.

    Sohn, NeurIPS 2016, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective",
    equation 7. Of every class the first image of the batch is the anchor, the second its positive.

    Args:
      embeddings: [B, D], floating point; compared by their product.
      labels: [B], integer class numbers.
      scale: factor of the products, 1 in the paper, whose embeddings are not normalized.

    Returns:
      A float32 scalar, the mean over the classes with two images; 0 with one such class.

    >>> x, labels = jnp.repeat(jnp.eye(2), 2, 0), jnp.array([0, 0, 1, 1])
    >>> print(f"{n_pair_loss(x, labels, scale=1.0):.4f}")  # log(1 + 1 / e)
    0.3133
    """
    check(embeddings, labels, "embeddings")
    x = embeddings.astype(jnp.float32)
    same = labels[:, None] == labels[None, :]
    earlier = jnp.tril(same, -1).sum(1)  # images of the class before this one
    anchor, second = earlier == 0, earlier == 1
    logits = scale * products(x, x)
    others = masked_logsumexp(logits, ~same & second)[:, None]
    pair = anchor[:, None] & second[None, :] & same & (~same & second).any(1, keepdims=True)
    return masked_mean(jax.nn.softplus(others - logits), pair)


def smooth_ap_loss(
    embeddings: jax.Array, labels: jax.Array, temperature: float = 0.01
) -> jax.Array:
    """One minus the mean average precision, with sigmoids for the steps of the ranks.

    Brown et al., ECCV 2020, https://arxiv.org/abs/2007.12163, equation 7. An anchor does not find
    itself, as in the paper; the authors' program and pytorch-metric-learning count it among its
    own positives and need classes of equal size.

    Args:
      embeddings: [B, D], floating point; compared by cosine.
      labels: [B], integer class numbers.
      temperature: of the sigmoid of differences of similarities.

    Returns:
      A float32 scalar in [0, 1], the mean over the valid anchors.

    >>> x, labels = jnp.repeat(jnp.eye(2), 2, 0), jnp.array([0, 0, 1, 1])
    >>> print(f"{smooth_ap_loss(x, labels):.4f}")
    0.0000
    """
    _, positive, negative = pairs_of(embeddings, labels)
    similarity = similarities(embeddings)

    @jax.checkpoint  # else the backward pass keeps B matrices of B × B
    def anchor(row):
        values, is_positive, is_negative = row
        ahead = jax.nn.sigmoid((values[None, :] - values[:, None]) / temperature)
        ahead = ahead * ~jnp.eye(len(values), dtype=bool)
        among_positives = 1 + (ahead * is_positive).sum(1)
        rank = among_positives + (ahead * is_negative).sum(1)
        return masked_mean(among_positives / rank, is_positive)

    precision = jax.lax.map(anchor, (similarity, positive, negative))
    return masked_mean(1 - precision, positive.any(1) & negative.any(1))


def recall_at_k_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    ks: tuple[int, ...] = (1, 2, 4, 8, 16),
    rank_temperature: float = 0.01,
    k_temperature: float = 1.0,
    mixup: int = 0,
    *,
    key: jax.Array | None = None,
) -> jax.Array:
    """One minus the mean Recall@K, with sigmoids for both of its steps.

    Patel, Tolias & Matas, CVPR 2022, https://arxiv.org/abs/2108.11179, normalized as the authors'
    program does: ``min(k, Σ_p σ(k - rank(p))) / min(k, |P|)`` over the positives P of an anchor,
    where rank(p) counts by sigmoids the images more similar than p. With `mixup` (section 3.3)
    virtual images between two of one class are anchors and references too; they are mixed from
    the embeddings, which mixes their similarities.

    Args:
      embeddings: [B, D], floating point; compared by cosine.
      labels: [B], integer class numbers.
      ks: the K whose recalls are averaged.
      rank_temperature: of the sigmoid of differences of similarities.
      k_temperature: of the sigmoid of k - rank.
      mixup: virtual images for each image, mixed with the next ones of its class, cyclically;
        half the number of the others makes every pair once.
      key: draws the shares of the mixture, uniformly; needed if `mixup` is not 0.

    Returns:
      A float32 scalar in [0, 1], the mean over the valid anchors.

    Raises:
      ValueError: wrong ranks, lengths or dtypes; mixup without a key.

    >>> x, labels = jnp.repeat(jnp.eye(2), 2, 0), jnp.array([0, 0, 1, 1])
    >>> print(f"{recall_at_k_loss(x, labels, ks=(1, 2), k_temperature=0.01):.4f}")  # σ(0), σ(1)
    0.2500
    """
    check(embeddings, labels, "embeddings")
    unit = _unit(embeddings)
    real = jnp.ones(len(labels), bool)
    if mixup:
        if key is None:
            raise ValueError(f"mixup={mixup} draws random numbers and needs a key.")
        partners, real_partners = _next_of_class(labels, mixup)
        share = jax.random.uniform(key, (mixup, len(labels), 1))
        virtual = share * unit + (1 - share) * unit[partners]
        unit = jnp.concatenate([unit, virtual.reshape(-1, unit.shape[1])])
        labels = jnp.tile(labels, mixup + 1)
        real = jnp.concatenate([real, real_partners.reshape(-1)])
    same = labels[:, None] == labels[None, :]
    seen = real[:, None] & real[None, :] & ~jnp.eye(len(labels), dtype=bool)

    @jax.checkpoint  # else the backward pass keeps B matrices of B × B
    def anchor(row):
        values, is_positive, is_seen = row
        ahead = jax.nn.sigmoid((values[None, :] - values[:, None]) / rank_temperature)
        rank = 1 + (ahead * (is_seen & ~jnp.eye(len(values), dtype=bool))).sum(1)
        recalls = []
        for k in ks:
            found = jax.nn.sigmoid((k - rank) / k_temperature) * is_positive
            recalls.append(jnp.minimum(found.sum(), k) / jnp.clip(is_positive.sum(), 1, k))
        return sum(recalls) / len(ks)

    positive = seen & same
    recall = jax.lax.map(anchor, (products(unit, unit), positive, seen))
    return masked_mean(1 - recall, positive.any(1) & (seen & ~same).any(1))


def _unit(embeddings: jax.Array) -> jax.Array:
    return l2_normalize(embeddings.astype(jnp.float32))


def _next_of_class(labels: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """[count, B]: the images that follow in the same class, cyclically; whether it is another."""
    same = labels[:, None] == labels[None, :]
    place, size = jnp.tril(same, -1).sum(1), same.sum(1)
    wanted = (place + jnp.arange(1, count + 1)[:, None]) % size
    chosen = (same & (place[None, None, :] == wanted[:, :, None])).argmax(2)
    return chosen, chosen != jnp.arange(len(labels))
