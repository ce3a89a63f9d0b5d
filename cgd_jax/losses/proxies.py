"""Losses with proxies: learned vectors that stand for the classes.

They take `embeddings [B, D]`, `labels [B]` in [0, M) and `proxies`, which are trained with the
network at a learning rate of their own, and return a float32 scalar. Vectors are compared by
their directions. ValueError is raised for wrong ranks, lengths or dtypes.
"""

import jax
import jax.numpy as jnp

from cgd_jax.losses.pairs import check, safe_root, similarities, soft_sum

__all__ = ["create_proxies", "proxy_anchor_loss", "proxy_nca_loss", "soft_triple_loss"]


def create_proxies(key: jax.Array, classes: int, count: int, dim: int) -> jax.Array:
    """Draws directions at random.

    Args:
      key: of the draw.
      classes: M.
      count: vectors a class, S.
      dim: D.

    Returns:
      [M, S, D] float32, of lengths near 1.

    >>> create_proxies(jax.random.key(0), 5, 2, 3).shape
    (5, 2, 3)
    """
    return jax.random.normal(key, (classes, count, dim)) / jnp.sqrt(dim)


def proxy_nca_loss(
    embeddings: jax.Array, labels: jax.Array, proxies: jax.Array, temperature: float = 1 / 9
) -> jax.Array:
    """Proxy-NCA++: cross-entropy of squared distances to the proxies.

    Teh, DeVries & Taylor, ECCV 2020, https://arxiv.org/abs/2004.01113, equation 6; the softmax
    goes over all proxies, that of the true class among them.

    Args:
      embeddings: [B, D], floating point.
      labels: [B], integers in [0, M).
      proxies: [M, 1, D].
      temperature: by which the squared distances are divided, σ of the paper.

    Returns:
      A float32 scalar, the mean over the batch.

    >>> x, proxies = jnp.eye(2), jnp.eye(2)[:, None]
    >>> print(f"{proxy_nca_loss(x, jnp.array([0, 1]), proxies, 2.0):.4f}")  # log(1 + 1/e)
    0.3133
    """
    similarity, true = _to_proxies(embeddings, labels, proxies)
    # Of unit vectors the squared distance is 2 - 2 cos.
    log_probabilities = jax.nn.log_softmax(2 * similarity[:, :, 0] / temperature)
    return -jnp.mean(jnp.where(true, log_probabilities, 0.0).sum(1))


def proxy_anchor_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    proxies: jax.Array,
    margin: float = 0.1,
    alpha: float = 32.0,
) -> jax.Array:
    """Every proxy is an anchor, the images of the batch are its positives and negatives.

    Kim et al., CVPR 2020, https://arxiv.org/abs/2003.13911, equation 4. The pull is a mean over
    the proxies that have a positive in the batch, the push one over all.

    Args:
      embeddings: [B, D], floating point.
      labels: [B], integers in [0, M).
      proxies: [M, 1, D].
      margin: δ, in units of cosine.
      alpha: sharpness.

    Returns:
      A float32 scalar.

    >>> x, proxies = jnp.eye(2), jnp.eye(2)[:, None]
    >>> print(f"{proxy_anchor_loss(x, jnp.array([0, 1]), proxies, 0.0, 1.0):.4f}")
    1.0064
    """
    similarity, true = _to_proxies(embeddings, labels, proxies)
    similarity = similarity[:, :, 0]
    pull = soft_sum(-alpha * (similarity - margin), true, 0)
    push = soft_sum(alpha * (similarity + margin), ~true, 0)
    return pull.sum() / jnp.maximum(true.any(0).sum(), 1) + push.mean()


def soft_triple_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    proxies: jax.Array,
    scale: float = 20.0,
    gamma: float = 0.1,
    margin: float = 0.01,
    regularization: float = 0.2,
) -> jax.Array:
    """Cross-entropy over classes with several centers each, which merge where they can.

    Qian et al., ICCV 2019, https://arxiv.org/abs/1909.05235, equations 7 to 10. The similarity to
    a class is that to its centers, weighted by their softmax. pytorch-metric-learning has no
    regularizer, which here is as published.

    Args:
      embeddings: [B, D], floating point.
      labels: [B], integers in [0, M).
      proxies: [M, K, D], the centers.
      scale: λ, of the similarities.
      gamma: entropy of the choice of a center, by which similarities are divided there.
      margin: δ, in units of cosine.
      regularization: τ, weight of the mean distance between centers of one class.

    Returns:
      A float32 scalar.

    >>> x, proxies = jnp.eye(2), jnp.repeat(jnp.eye(2)[:, None], 3, 1)
    >>> print(f"{soft_triple_loss(x, jnp.array([0, 1]), proxies, 1.0, margin=0.0):.4f}")
    0.3133
    """
    similarity, true = _to_proxies(embeddings, labels, proxies)
    relaxed = (jax.nn.softmax(similarity / gamma, 2) * similarity).sum(2)
    log_probabilities = jax.nn.log_softmax(scale * (relaxed - margin * true))
    loss = -jnp.mean(jnp.where(true, log_probabilities, 0.0).sum(1))
    classes, count, _ = proxies.shape
    if count == 1 or not regularization:
        return loss
    first, second = jnp.triu_indices(count, 1)
    cosines = jax.vmap(similarities)(proxies)[:, first, second]
    # Rounding makes 1 - cos of equal centers anything below 1e-6, and the root steep there.
    squared = 2 - 2 * cosines
    apart = safe_root(jnp.where(squared > 1e-5, squared, 0.0)).sum()
    return loss + regularization * apart / (classes * count * (count - 1))


def _to_proxies(
    embeddings: jax.Array, labels: jax.Array, proxies: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """[B, M, K] cosines to the proxies; [B, M] whether the image is of that class."""
    check(embeddings, labels, "embeddings")
    if proxies.ndim != 3 or proxies.shape[2] != embeddings.shape[1]:
        raise ValueError(
            f"proxies must have shape [M, K, D] with the embeddings' D; got {proxies.shape} for "
            f"embeddings {embeddings.shape}."
        )
    classes, count, dim = proxies.shape
    cosines = similarities(embeddings, proxies.reshape(-1, dim)).reshape(-1, classes, count)
    return cosines, labels[:, None] == jnp.arange(classes)
