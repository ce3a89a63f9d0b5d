"""Classification losses: the paper's on logits, and those on angles to the centers of classes.

The ones on angles take `embeddings [B, D]`, floating point, `labels [B]`, integers in [0, M), and
`centers [M, S, D]`, floating point, which are trained with the network, and compare them by
cosine. S, above 1, are sub-centers: the class is as near as its nearest one (Deng et al., ECCV
2020, "Sub-center ArcFace"). A `scale` multiplies cosines, a `temperature`, above 0, divides them.

All of them return a float32 scalar, the mean over the batch, and raise ValueError for wrong
ranks, lengths or dtypes, or a hyper-parameter out of its range.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cgd_jax.losses.pairs import batch_mean, checked, safe_root, similarities

__all__ = [
    "CENTER_LOSSES",
    "arcface_loss",
    "class_similarities",
    "cosface_loss",
    "normalized_softmax_loss",
    "smoothed_cross_entropy",
]


def normalized_softmax_loss(
    embeddings: jax.Array, labels: jax.Array, centers: jax.Array, temperature: float = 0.05
) -> jax.Array:
    """Cross-entropy of cosines.

    Zhai & Wu, BMVC 2019, https://arxiv.org/abs/1811.12649, equation 3.

    >>> x, centers = jnp.eye(2), jnp.eye(2)[:, None]
    >>> print(f"{normalized_softmax_loss(x, jnp.array([0, 1]), centers, 1.0):.4f}")  # log(1 + 1/e)
    0.3133
    """
    cosines, true = cosines_to(centers, embeddings, labels)
    return cross_entropy(cosines.max(2) / temperature, true, embeddings)


def cosface_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    centers: jax.Array,
    margin: float = 0.35,
    scale: float = 64.0,
) -> jax.Array:
    """Cross-entropy of scaled cosines, that of the true class less a margin.

    Wang et al., CVPR 2018, https://arxiv.org/abs/1801.09414, equation 4.

    >>> x, centers = jnp.eye(2), jnp.eye(2)[:, None]
    >>> print(f"{cosface_loss(x, jnp.array([0, 1]), centers, 1.0, 1.0):.4f}")  # log 2
    0.6931
    """
    cosines, true = cosines_to(centers, embeddings, labels)
    return cross_entropy(scale * (cosines.max(2) - margin * true), true, embeddings)


def arcface_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    centers: jax.Array,
    margin: float = 0.5,
    scale: float = 64.0,
) -> jax.Array:
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
      temperature: τ; below 1 it sharpens.
      smoothing: ε in [0, 1).

    >>> logits, labels = jnp.array([[2.0, 0.0]]), jnp.array([0])
    >>> loss = smoothed_cross_entropy(logits, labels, temperature=0.5, smoothing=0.1)
    >>> print(f"{loss:.4f}")  # softmax of [4, 0] against the target [0.95, 0.05]
    0.2181
    """
    logits = checked(logits, labels, "logits")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}.")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1); got {smoothing}.")
    log_probabilities = jax.nn.log_softmax(logits / temperature)
    true_class = jnp.take_along_axis(log_probabilities, labels[:, None], 1)[:, 0]
    return -jnp.mean((1 - smoothing) * true_class + smoothing * log_probabilities.mean(1))


def class_similarities(embeddings: jax.Array, centers: jax.Array) -> jax.Array:
    """Cosines to the nearest center of every class, [B, M] float32.

    >>> centers = jnp.array([[[2.0, 0.0], [0.0, 3.0]], [[-1.0, 0.0], [-1.0, 0.0]]])
    >>> class_similarities(jnp.eye(2), centers).tolist()
    [[1.0, -1.0], [1.0, 0.0]]
    """
    return _cosines(embeddings, centers).max(2)


def cosines_to(
    vectors: jax.Array, embeddings: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """[B, M, S] cosines to the vectors of classes; [B, M] whether the image is of that class."""
    embeddings = checked(embeddings, labels)
    if vectors.ndim != 3 or vectors.shape[2] != embeddings.shape[1]:
        raise ValueError(
            f"proxies or centers must have shape [M, S, D] with the embeddings' D; got "
            f"{vectors.shape} for embeddings {embeddings.shape}."
        )
    return _cosines(embeddings, vectors), labels[:, None] == jnp.arange(len(vectors))


def _cosines(embeddings: jax.Array, vectors: jax.Array) -> jax.Array:
    classes, count, dim = vectors.shape
    return similarities(embeddings, vectors.reshape(-1, dim)).reshape(-1, classes, count)


def cross_entropy(logits: jax.Array, true: jax.Array, embeddings: jax.Array) -> jax.Array:
    """The mean of -log softmax at the true class; zero gradient where a label is no class."""
    cost = -jnp.where(true, jax.nn.log_softmax(logits), 0.0).sum(1)
    return batch_mean(cost, jnp.ones(len(cost), bool), embeddings)


CENTER_LOSSES: dict[str, Callable[..., jax.Array]] = {
    "normalized_softmax": normalized_softmax_loss,
    "cosface": cosface_loss,
    "arcface": arcface_loss,
}
