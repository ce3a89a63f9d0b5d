"""Losses with proxies: learned vectors that stand for the classes.

They take `embeddings [B, D]`, floating point, `labels [B]`, integers in [0, M), and `proxies
[M, K, D]`, which are trained with the network at a learning rate of their own, and return a
float32 scalar, the mean over the batch unless another is named. Vectors are compared by their
directions. ValueError is raised for wrong ranks, lengths or dtypes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cgd_jax.losses.classification import cosines_to, cross_entropy
from cgd_jax.losses.pairs import safe_root, similarities, soft_sum

__all__ = [
    "PROXY_LOSSES",
    "create_proxies",
    "proxy_anchor_loss",
    "proxy_nca_loss",
    "soft_triple_loss",
]


def create_proxies(key: jax.Array, classes: int, count: int, dim: int) -> jax.Array:
    """Draws directions at random: [classes, count, dim] float32, of lengths near 1.

    >>> create_proxies(jax.random.key(0), 5, 2, 3).shape
    (5, 2, 3)
    """
    return jax.random.normal(key, (classes, count, dim)) / jnp.sqrt(dim)


def proxy_nca_loss(
    embeddings: jax.Array, labels: jax.Array, proxies: jax.Array, temperature: float = 1 / 9
) -> jax.Array:
    """Proxy-NCA++: cross-entropy of squared distances to the proxies, one a class.

    Teh, DeVries & Taylor, ECCV 2020, https://arxiv.org/abs/2004.01113, equation 6; the softmax
    goes over all proxies, that of the true class among them. `temperature`, the paper's σ, divides
    the squared distances.

    >>> x, proxies = jnp.eye(2), jnp.eye(2)[:, None]
    >>> print(f"{proxy_nca_loss(x, jnp.array([0, 1]), proxies, 2.0):.4f}")  # log(1 + 1/e)
    0.3133
    """
    similarity, true = cosines_to(proxies, embeddings, labels)
    # Of unit vectors the squared distance is 2 - 2 cos.
    return cross_entropy(2 * similarity[:, :, 0] / temperature, true, embeddings)


def proxy_anchor_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    proxies: jax.Array,
    margin: float = 0.1,
    alpha: float = 32.0,
) -> jax.Array:
    """Every proxy is an anchor, the images of the batch are its positives and negatives.

    Kim et al., CVPR 2020, https://arxiv.org/abs/2003.13911, equation 4, with one proxy a class.
    The pull is a mean over the proxies that have a positive in the batch, the push one over all.
    `margin`, δ, is one of cosines; `alpha` is the sharpness.

    >>> x, proxies = jnp.eye(2), jnp.eye(2)[:, None]
    >>> print(f"{proxy_anchor_loss(x, jnp.array([0, 1]), proxies, 0.0, 1.0):.4f}")
    1.0064
    """
    similarity, true = cosines_to(proxies, embeddings, labels)
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
    a class is that to its centers, the proxies, weighted by their softmax.
    pytorch-metric-learning has no regularizer, which here is as published.

    Args:
      scale: λ, of the similarities.
      gamma: entropy of the choice of a center, by which similarities are divided there.
      margin: δ, in units of cosine.
      regularization: τ, weight of the mean distance between centers of one class.

    >>> x, proxies = jnp.eye(2), jnp.repeat(jnp.eye(2)[:, None], 3, 1)
    >>> print(f"{soft_triple_loss(x, jnp.array([0, 1]), proxies, 1.0, margin=0.0):.4f}")
    0.3133
    """
    similarity, true = cosines_to(proxies, embeddings, labels)
    relaxed = (jax.nn.softmax(similarity / gamma, 2) * similarity).sum(2)
    loss = cross_entropy(scale * (relaxed - margin * true), true, embeddings)
    classes, count, _ = proxies.shape
    if count == 1 or not regularization:
        return loss
    first, second = jnp.triu_indices(count, 1)
    cosines = jax.vmap(similarities)(proxies)[:, first, second]
    # Rounding makes 1 - cos of equal centers anything below 1e-6, and the root steep there.
    squared = 2 - 2 * cosines
    apart = safe_root(jnp.where(squared > 1e-5, squared, 0.0)).sum()
    return loss + regularization * apart / (classes * count * (count - 1))


PROXY_LOSSES: dict[str, Callable[..., jax.Array]] = {
    "proxy_nca": proxy_nca_loss,
    "proxy_anchor": proxy_anchor_loss,
    "soft_triple": soft_triple_loss,
}
