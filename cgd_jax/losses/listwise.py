"""Ranking losses on the order of a batch.

They take `embeddings [B, D]` and `labels [B]` and keep to what `ranking` says of its losses, but
for the miner and the memory, which they do not take.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from cgd_jax.combination import l2_normalize
from cgd_jax.losses import pairs
from cgd_jax.losses.pairs import LIMIT, batch_mean, checked, masked_logsumexp, masked_mean

__all__ = ["LIST_LOSSES", "n_pair_loss", "recall_at_k_loss", "smooth_ap_loss"]


def n_pair_loss(embeddings: Array, labels: Array, scale: float = 16.0) -> Array:
    """Cross-entropy of one positive a class against the positives of all other classes.

    Sohn, NeurIPS 2016, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective",
    equation 7. Of every class the first image of the batch is the anchor, the second its positive.
    The mean over the classes with two images; 0 with one such class. Vectors are compared by
    their product times `scale`, 1 in the paper, whose embeddings are not normalized.

    >>> x, labels = jnp.repeat(jnp.eye(2), 2, 0), jnp.array([0, 0, 1, 1])
    >>> print(f"{n_pair_loss(x, labels, scale=1.0):.4f}")  # log(1 + 1 / e)
    0.3133
    """
    x, labels = checked(embeddings, labels)
    x = jnp.clip(x, -LIMIT, LIMIT)
    same = labels[:, None] == labels[None, :]
    earlier = jnp.tril(same, -1).sum(1)  # images of the class before this one
    anchor, second = earlier == 0, earlier == 1
    logits = scale * pairs.products(x, x)
    others = masked_logsumexp(logits, ~same & second)[:, None]
    pair = anchor[:, None] & second[None, :] & same & (~same & second).any(1, keepdims=True)
    return batch_mean(jax.nn.softplus(others - logits), pair, embeddings)


def smooth_ap_loss(embeddings: Array, labels: Array, temperature: float = 0.01) -> Array:
    """One minus the mean average precision, with sigmoids for the steps of the ranks.

    Brown et al., ECCV 2020, https://arxiv.org/abs/2007.12163, equation 7; in [0, 1]. The sigmoids
    are of differences of cosines over `temperature`. An anchor does not find itself, as in the
    paper; in the authors' program and pytorch-metric-learning it does.

    >>> x, labels = jnp.repeat(jnp.eye(2), 2, 0), jnp.array([0, 0, 1, 1])
    >>> print(f"{smooth_ap_loss(x, labels):.4f}")
    0.0000
    """
    found = pairs.pairs_of(embeddings, labels)

    @jax.checkpoint  # else the backward pass keeps B matrices of B × B
    def anchor(row):
        values, is_positive, is_negative = row
        ahead = _ahead(values, temperature)
        among_positives = 1 + (ahead * is_positive).sum(1)
        rank = among_positives + (ahead * is_negative).sum(1)
        return masked_mean(among_positives / rank, is_positive)

    precision = jax.lax.map(anchor, (found.similarities, found.positive, found.negative))
    return batch_mean(1 - precision, found.valid, embeddings)


def recall_at_k_loss(
    embeddings: Array,
    labels: Array,
    ks: tuple[int, ...] = (1, 2, 4, 8, 16),
    rank_temperature: float = 0.01,
    k_temperature: float = 1.0,
    mixup: int = 0,
    *,
    key: Array | None = None,
) -> Array:
    """One minus the mean Recall@K, with sigmoids for both of its steps.

    Patel, Tolias & Matas, CVPR 2022, https://arxiv.org/abs/2108.11179, normalized as the authors'
    program does: ``min(k, Σ_p σ(k - rank(p))) / min(k, |P|)`` over the positives P of an anchor,
    where rank(p) counts by sigmoids the images more similar than p. `mixup` (section 3.3) is how
    many virtual images every one has, anchors and references too, whose embeddings are mixed with
    the next ones of its class, cyclically; half the number of the others makes every pair once.
    `key` draws the shares, uniformly: ValueError if it is missing.

    >>> x, labels = jnp.repeat(jnp.eye(2), 2, 0), jnp.array([0, 0, 1, 1])
    >>> print(f"{recall_at_k_loss(x, labels, ks=(1, 2), k_temperature=0.01):.4f}")  # σ(0), σ(1)
    0.2500
    """
    x, labels = checked(embeddings, labels)
    unit = l2_normalize(x)
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
        rank = 1 + (_ahead(values, rank_temperature) * is_seen).sum(1)
        k = jnp.array(ks)
        found = (jax.nn.sigmoid((k[:, None] - rank) / k_temperature) * is_positive).sum(1)
        return jnp.mean(jnp.minimum(found, k) / jnp.clip(is_positive.sum(), 1, k))

    positive = seen & same
    recall = jax.lax.map(anchor, (pairs.products(unit, unit), positive, seen))
    return batch_mean(1 - recall, positive.any(1) & (seen & ~same).any(1), embeddings)


def _ahead(similarities: Array, temperature: float) -> Array:
    """[N, N]: how far, 0 to 1, column j comes before row i in the order of one anchor's [N]."""
    ahead = jax.nn.sigmoid((similarities[None, :] - similarities[:, None]) / temperature)
    return ahead * ~jnp.eye(len(similarities), dtype=bool)


def _next_of_class(labels: Array, count: int) -> tuple[Array, Array]:
    """[count, B]: the images that follow in the same class, cyclically; whether it is another."""
    same = labels[:, None] == labels[None, :]
    place, size = jnp.tril(same, -1).sum(1), same.sum(1)
    wanted = (place + jnp.arange(1, count + 1)[:, None]) % size
    chosen = (same & (place[None, None, :] == wanted[:, :, None])).argmax(2)
    return chosen, chosen != jnp.arange(len(labels))


LIST_LOSSES: dict[str, Callable[..., Array]] = {
    "n_pair": n_pair_loss,
    "smooth_ap": smooth_ap_loss,
    "recall_at_k": recall_at_k_loss,
}
