"""Losses with learned vectors of classes, and the paper's classification of logits.

The former take `embeddings [B, D]`, floating point, `labels [B]`, integers in [0, M), and
`centers`, or `proxies`, [M, S, D], which are trained with the network, and compare by cosine. Of
S sub-centers above 1 the nearest counts (Deng et al., ECCV 2020, "Sub-center ArcFace"). A `scale`
multiplies cosines, a `temperature`, above 0, divides them.

All of them return a float32 scalar, the mean over the batch unless another is named, and raise
ValueError for wrong ranks, lengths or dtypes, or a hyper-parameter out of its range.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cgd_jax.losses.pairs import checked, nan_unless_finite, safe_root, similarities, soft_sum

__all__ = [
    "CENTER_LOSSES",
    "PROXY_LOSSES",
    "arcface_loss",
    "class_similarities",
    "cosface_loss",
    "create_proxies",
    "normalized_softmax_loss",
    "proxy_anchor_loss",
    "proxy_nca_loss",
    "smoothed_cross_entropy",
    "soft_triple_loss",
]


def normalized_softmax_loss(
    embeddings: Array, labels: Array, centers: Array, temperature: float = 0.05
) -> Array:
    """Cross-entropy of cosines.

    Zhai & Wu, BMVC 2019, https://arxiv.org/abs/1811.12649, equation 3.

    >>> x, centers = jnp.eye(2), jnp.eye(2)[:, None]
    >>> print(f"{normalized_softmax_loss(x, jnp.array([0, 1]), centers, 1.0):.4f}")  # log(1 + 1/e)
    0.3133
    """
    cosines, true = cosines_to(centers, embeddings, labels)
    return cross_entropy(cosines.max(2) / temperature, true, embeddings)


def cosface_loss(
    embeddings: Array, labels: Array, centers: Array, margin: float = 0.35, scale: float = 64.0
) -> Array:
    """Cross-entropy of scaled cosines, that of the true class less a margin.

    Wang et al., CVPR 2018, https://arxiv.org/abs/1801.09414, equation 4.

    >>> x, centers = jnp.eye(2), jnp.eye(2)[:, None]
    >>> print(f"{cosface_loss(x, jnp.array([0, 1]), centers, 1.0, 1.0):.4f}")  # log 2
    0.6931
    """
    cosines, true = cosines_to(centers, embeddings, labels)
    return cross_entropy(scale * (cosines.max(2) - margin * true), true, embeddings)


def arcface_loss(
    embeddings: Array, labels: Array, centers: Array, margin: float = 0.5, scale: float = 64.0
) -> Array:
    """Cross-entropy of scaled cosines, after the angle to the true class grew by `margin` radians.

    Deng et al., CVPR 2019, https://arxiv.org/abs/1801.07698, equation 3. Where the angle would
    pass π, cos θ - margin sin(margin) takes its place, as in the authors' program, so that the
    loss still falls with the angle.

    >>> x, centers = jnp.eye(2), jnp.eye(2)[:, None]
    >>> print(f"{arcface_loss(x, jnp.array([0, 1]), centers, jnp.pi / 2, 1.0):.3f}")  # log 2
    0.693
    """
    all_cosines, true = cosines_to(centers, embeddings, labels)
    cosines = all_cosines.max(2)
    moved = cosines * jnp.cos(margin) - safe_root(1 - cosines**2) * jnp.sin(margin)
    moved = jnp.where(cosines > -jnp.cos(margin), moved, cosines - margin * jnp.sin(margin))
    return cross_entropy(scale * jnp.where(true, moved, cosines), true, embeddings)


def create_proxies(key: Array, classes: int, count: int, dim: int) -> Array:
    """Draws directions at random: [classes, count, dim] float32, of lengths near 1.

    >>> create_proxies(jax.random.key(0), 5, 2, 3).shape
    (5, 2, 3)
    """
    return jax.random.normal(key, (classes, count, dim)) / jnp.sqrt(dim)


def proxy_nca_loss(
    embeddings: Array, labels: Array, proxies: Array, temperature: float = 1 / 9
) -> Array:
    """Proxy-NCA++: cross-entropy of squared distances to the proxies, one a class.

    Teh, DeVries & Taylor, ECCV 2020, https://arxiv.org/abs/2004.01113, equation 6; `temperature`,
    the paper's σ, divides the squared distances.

    >>> x, proxies = jnp.eye(2), jnp.eye(2)[:, None]
    >>> print(f"{proxy_nca_loss(x, jnp.array([0, 1]), proxies, 2.0):.4f}")  # log(1 + 1/e)
    0.3133
    """
    similarity, true = cosines_to(proxies, embeddings, labels)
    # Of unit vectors the squared distance is 2 - 2 cos.
    return cross_entropy(2 * similarity[:, :, 0] / temperature, true, embeddings)


def proxy_anchor_loss(
    embeddings: Array, labels: Array, proxies: Array, margin: float = 0.1, alpha: float = 32.0
) -> Array:
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
    embeddings: Array,
    labels: Array,
    proxies: Array,
    scale: float = 20.0,
    gamma: float = 0.1,
    margin: float = 0.01,
    regularization: float = 0.2,
) -> Array:
    """Cross-entropy over classes with several centers each, which merge where they can.

    Qian et al., ICCV 2019, https://arxiv.org/abs/1909.05235, equations 7 to 10: `scale` λ,
    `margin` δ in units of cosine, `regularization` τ of the mean distance between centers of one
    class, which pytorch-metric-learning lacks. The similarity to a class is that to its centers,
    the proxies, weighted by their softmax after a division by `gamma`.

    >>> x, proxies = jnp.eye(2), jnp.repeat(jnp.eye(2)[:, None], 3, 1)
    >>> print(f"{soft_triple_loss(x, jnp.array([0, 1]), proxies, 1.0, margin=0.0):.4f}")
    0.3133
    """
    similarity, true = cosines_to(proxies, embeddings, labels)
    relaxed = (jax.nn.softmax(similarity / gamma, 2) * similarity).sum(2)
    loss = cross_entropy(scale * (relaxed - margin * true), true, embeddings)
    classes, count, _ = np.shape(proxies)
    if count == 1 or not regularization:
        return loss
    first, second = jnp.triu_indices(count, 1)
    cosines = jax.vmap(similarities)(jnp.asarray(proxies))[:, first, second]
    # Rounding makes 1 - cos of equal centers anything below 1e-6, and the root steep there.
    squared = 2 - 2 * cosines
    apart = safe_root(jnp.where(squared > 1e-5, squared, 0.0)).sum()
    return loss + regularization * apart / (classes * count * (count - 1))


def smoothed_cross_entropy(
    logits: Array, labels: Array, temperature: float = 0.5, smoothing: float = 0.1
) -> Array:
    """Softmax cross-entropy with temperature scaling and label smoothing.

    The auxiliary loss of CGD (section 3.2), with the label smoothing of Szegedy et al.,
    https://arxiv.org/abs/1512.00567: of `logits [B, M]`, floating point, divided by `temperature`,
    against ``1 - smoothing`` on the true class plus ``smoothing / M`` on each of all M classes.

    >>> logits, labels = jnp.array([[2.0, 0.0]]), jnp.array([0])
    >>> loss = smoothed_cross_entropy(logits, labels, temperature=0.5, smoothing=0.1)
    >>> print(f"{loss:.4f}")  # softmax of [4, 0] against the target [0.95, 0.05]
    0.2181
    """
    logits, labels = checked(logits, labels, "logits")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}.")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1); got {smoothing}.")
    log_probabilities = jax.nn.log_softmax(logits / temperature)
    true_class = jnp.take_along_axis(log_probabilities, labels[:, None], 1)[:, 0]
    return -jnp.mean((1 - smoothing) * true_class + smoothing * log_probabilities.mean(1))


def class_similarities(embeddings: Array, centers: Array) -> Array:
    """Cosines to the nearest center of every class, [B, M] float32.

    >>> centers = jnp.array([[[2.0, 0.0], [0.0, 3.0]], [[-1.0, 0.0], [-1.0, 0.0]]])
    >>> class_similarities(jnp.eye(2), centers).tolist()
    [[1.0, -1.0], [1.0, 0.0]]
    """
    return cosines_to(centers, embeddings, jnp.zeros(len(embeddings), int))[0].max(2)


def cosines_to(vectors: Array, embeddings: Array, labels: Array) -> tuple[Array, Array]:
    """[B, M, S] cosines to the vectors of classes; [B, M] whether the image is of that class."""
    (embeddings, labels), vectors = checked(embeddings, labels), jnp.asarray(vectors)
    if vectors.ndim != 3 or vectors.shape[2] != embeddings.shape[1]:
        raise ValueError(
            f"proxies or centers must have shape [M, S, D] with the embeddings' D; got "
            f"{vectors.shape} for embeddings {embeddings.shape}."
        )
    cosines = similarities(embeddings, vectors.reshape(-1, vectors.shape[2]))
    return cosines.reshape(-1, *vectors.shape[:2]), labels[:, None] == jnp.arange(len(vectors))


def cross_entropy(logits: Array, true: Array, embeddings: Array) -> Array:
    """The mean of -log softmax at the true class; zero gradient where a label is no class."""
    cost = -jnp.where(true, jax.nn.log_softmax(logits), 0.0).sum(1)
    return nan_unless_finite(embeddings, cost.mean())


CENTER_LOSSES: dict[str, Callable[..., Array]] = {
    "normalized_softmax": normalized_softmax_loss,
    "cosface": cosface_loss,
    "arcface": arcface_loss,
}
PROXY_LOSSES: dict[str, Callable[..., Array]] = {
    "proxy_nca": proxy_nca_loss,
    "proxy_anchor": proxy_anchor_loss,
    "soft_triple": soft_triple_loss,
}
