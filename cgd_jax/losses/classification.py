"""Classification losses: the paper's on logits, and those on angles to the centers of classes.

The ones on angles compare `embeddings [B, D]` by cosine with `centers [M, S, D]`, which are
trained with the network. S, above 1, are sub-centers: the class is as near as its nearest one
(Deng et al., ECCV 2020, "Sub-center ArcFace").
"""

import jax
import jax.numpy as jnp

from cgd_jax.losses.pairs import check, safe_root, similarities

__all__ = [
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

    Args:
      embeddings: [B, D], floating point.
      labels: [B], integers in [0, M).
      centers: [M, S, D], floating point.
      temperature: by which the cosines are divided.

    Returns:
      A float32 scalar, the mean over the batch.

    Raises:
      ValueError: wrong ranks, lengths or dtypes.

    >>> x, centers = jnp.eye(2), jnp.eye(2)[:, None]
    >>> print(f"{normalized_softmax_loss(x, jnp.array([0, 1]), centers, 1.0):.4f}")  # log(1 + 1/e)
    0.3133
    """
    cosines, true = _cosines(embeddings, labels, centers)
    return _cross_entropy(cosines / temperature, true)


def cosface_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    centers: jax.Array,
    margin: float = 0.35,
    scale: float = 64.0,
) -> jax.Array:
    """Cross-entropy of scaled cosines, that of the true class less a margin.

    Wang et al., CVPR 2018, https://arxiv.org/abs/1801.09414, equation 4.

    Args:
      embeddings: [B, D], floating point.
      labels: [B], integers in [0, M).
      centers: [M, S, D], floating point.
      margin: in units of cosine.
      scale: of the cosines.

    Returns:
      A float32 scalar, the mean over the batch.

    Raises:
      ValueError: wrong ranks, lengths or dtypes.

    >>> x, centers = jnp.eye(2), jnp.eye(2)[:, None]
    >>> print(f"{cosface_loss(x, jnp.array([0, 1]), centers, 1.0, 1.0):.4f}")  # log 2
    0.6931
    """
    cosines, true = _cosines(embeddings, labels, centers)
    return _cross_entropy(scale * (cosines - margin * true), true)


def arcface_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    centers: jax.Array,
    margin: float = 0.5,
    scale: float = 64.0,
) -> jax.Array:
    """Cross-entropy of scaled cosines, after the angle to the true class grew by a margin.

    Deng et al., CVPR 2019, https://arxiv.org/abs/1801.07698, equation 3. Where the angle would
    pass π, cos θ - margin sin(margin) takes its place, as in the authors' program, so that the
    loss still falls with the angle.

    Args:
      embeddings: [B, D], floating point.
      labels: [B], integers in [0, M).
      centers: [M, S, D], floating point.
      margin: in radians, in [0, π).
      scale: of the cosines.

    Returns:
      A float32 scalar, the mean over the batch.

    Raises:
      ValueError: wrong ranks, lengths or dtypes.

    >>> x, centers = jnp.eye(2), jnp.eye(2)[:, None]
    >>> print(f"{arcface_loss(x, jnp.array([0, 1]), centers, jnp.pi / 2, 1.0):.3f}")  # log 2
    0.693
    """
    cosines, true = _cosines(embeddings, labels, centers)
    moved = cosines * jnp.cos(margin) - safe_root(1 - cosines**2) * jnp.sin(margin)
    moved = jnp.where(cosines > -jnp.cos(margin), moved, cosines - margin * jnp.sin(margin))
    return _cross_entropy(scale * jnp.where(true, moved, cosines), true)


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
    check(logits, labels, "logits")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}.")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1); got {smoothing}.")
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    true_class = jnp.take_along_axis(log_probabilities, labels[:, None], 1)[:, 0]
    return -jnp.mean((1 - smoothing) * true_class + smoothing * log_probabilities.mean(1))


def class_similarities(embeddings: jax.Array, centers: jax.Array) -> jax.Array:
    """Cosines to the nearest center of every class.

    Args:
      embeddings: [B, D], floating point.
      centers: [M, S, D].

    Returns:
      [B, M], float32.

    >>> centers = jnp.array([[[2.0, 0.0], [0.0, 3.0]], [[-1.0, 0.0], [-1.0, 0.0]]])
    >>> class_similarities(jnp.eye(2), centers).tolist()
    [[1.0, -1.0], [1.0, 0.0]]
    """
    classes, subs, dim = centers.shape
    return similarities(embeddings, centers.reshape(-1, dim)).reshape(-1, classes, subs).max(2)


def _cosines(
    embeddings: jax.Array, labels: jax.Array, centers: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """[B, M]: the cosine of every image to every class; whether the image is of that class."""
    check(embeddings, labels, "embeddings")
    if centers.ndim != 3 or centers.shape[2] != embeddings.shape[1]:
        raise ValueError(
            f"centers must have shape [M, S, D] with the embeddings' D; got {centers.shape} for "
            f"embeddings {embeddings.shape}."
        )
    return class_similarities(embeddings, centers), labels[:, None] == jnp.arange(len(centers))


def _cross_entropy(logits: jax.Array, true: jax.Array) -> jax.Array:
    """The mean of -log softmax at the true class; zero gradient where a label is no class."""
    return -jnp.mean(jnp.where(true, jax.nn.log_softmax(logits), 0.0).sum(1))
