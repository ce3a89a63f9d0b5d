"""Evaluation: embed the test images, then see at which rank the first true match stands."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from cgd_jax import metrics
from cgd_jax.augment import center_crop, normalize
from cgd_jax.datasets import Dataset
from cgd_jax.input_pipeline import prefetch
from cgd_jax.models.cgd import CGD


class Embeddings(NamedTuple):
    """Vectors of the test images, aligned with the splits of the data set."""

    query: np.ndarray  # [N, D] float32
    gallery: np.ndarray | None  # [G, D] float32; None: queries search each other


def embed_model(
    model: CGD, params: dict, batch_stats: dict, image_size: int
) -> Callable[[jax.Array], jax.Array]:
    """The trained (or untrained) network as a function: [B, S, S, 3] uint8 → [B, D].

    Args:
      model: the network.
      params: its weights.
      batch_stats: its BatchNorm statistics.
      image_size: what the network sees; of larger images it is the centre.

    Returns:
      A jitted function.
    """
    variables = {"params": params, "batch_stats": batch_stats}
    return lambda images: _model_embeddings(model, variables, images, image_size)


@partial(jax.jit, static_argnames=("model", "image_size"))
def _model_embeddings(model, variables, images, image_size):
    return model.apply(variables, normalize(center_crop(images, image_size))).embedding


@jax.jit
def embed_pixels(images: jax.Array) -> jax.Array:
    """The baseline without any network: the pixels themselves, at 32 × 32 at most.

    Args:
      images: [B, S, S, 3] uint8.

    Returns:
      [B, D] float32.
    """
    side = min(32, images.shape[1])
    shape = (len(images), side, side, 3)
    return jax.image.resize(images.astype(jnp.float32), shape, "linear").reshape(len(images), -1)


def embed_images(
    embed: Callable[[jax.Array], jax.Array],
    images: np.ndarray,
    batch_size: int,
    sharding: jax.sharding.NamedSharding,
    title: str = "embedding",
) -> np.ndarray:
    """Embeds all images of a split in batches over all devices.

    Args:
      embed: [B, S, S, 3] uint8 → [B, D], a jitted function.
      images: [N, S, S, 3] uint8.
      batch_size: images at a time; rounded up to a multiple of the devices.
      sharding: how a batch is laid over the devices.
      title: of the progress bar.

    Returns:
      [N, D] float32, in the order of `images`.
    """
    devices = sharding.mesh.size
    batch_size = -(-batch_size // devices) * devices
    count = len(images)

    def make_batch(i):
        chosen = np.arange(i * batch_size, min((i + 1) * batch_size, count))
        # The last batch is filled up: another shape would compile once more.
        return (images[np.resize(chosen, batch_size)],)

    parts = []
    with tqdm(total=count, desc=title, unit="image", leave=False, disable=None) as bar:
        for (batch,) in prefetch(make_batch, range(-(-count // batch_size)), sharding):
            parts.append(np.asarray(embed(batch)))
            bar.update(min(batch_size, count - bar.n))
    return np.concatenate(parts)[:count].astype(np.float32)


def embed_dataset(
    embed: Callable[[jax.Array], jax.Array],
    dataset: Dataset,
    batch_size: int,
    sharding: jax.sharding.NamedSharding,
) -> Embeddings:
    """Embeds the test images of a data set. Arguments as for `embed_images`."""
    query = embed_images(embed, dataset.query.images, batch_size, sharding, "embedding queries")
    if dataset.gallery is None:
        return Embeddings(query, None)
    gallery = embed_images(embed, dataset.gallery.images, batch_size, sharding, "embedding gallery")
    return Embeddings(query, gallery)


def recall(embeddings: Embeddings, dataset: Dataset, ks: tuple[int, ...]) -> dict[str, float]:
    """Recall@K of the test images.

    Args:
      embeddings: from `embed_dataset`.
      dataset: the data set that was embedded.
      ks: the numbers of neighbours K.

    Returns:
      {"recall_at_1": between 0 and 1, ...}.
    """
    recalls = metrics.recall_at_k(
        embeddings.query,
        dataset.query.labels,
        embeddings.gallery,
        None if dataset.gallery is None else dataset.gallery.labels,
        ks=ks,
    )
    return {f"recall_at_{k}": float(value) for k, value in recalls.items()}


def nearest(embeddings: Embeddings, rows: np.ndarray, k: int) -> np.ndarray:
    """The nearest neighbours of some queries, for people to look at.

    Args:
      embeddings: from `embed_dataset`.
      rows: [R] positions of queries.
      k: neighbours of each.

    Returns:
      [R, k] positions in the gallery (among the queries, if there is none; never the
      query itself), nearest first.
    """
    gallery = embeddings.query if embeddings.gallery is None else embeddings.gallery
    similarities = embeddings.query[rows] @ gallery.T
    if embeddings.gallery is None:
        similarities[np.arange(len(rows)), rows] = -np.inf
    return np.argsort(-similarities, axis=1, kind="stable")[:, :k]
