"""Images to embeddings, in batches over all devices."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cgd_jax import retrieval
from cgd_jax.data import Dataset, Split, cache
from cgd_jax.data.batches import prefetch
from cgd_jax.data.dataset import Images
from cgd_jax.data.shapes import Shape
from cgd_jax.runtime import console, files, processes


class Embeddings(NamedTuple):
    """Vectors of the test images, aligned with the splits of the data set."""

    query: np.ndarray  # [N, D] float32
    gallery: np.ndarray | None  # [G, D] float32; None: queries search each other

    def each(self, change: Callable[[np.ndarray], np.ndarray]) -> "Embeddings":
        """Changes the vectors of both."""
        query, gallery = self
        return Embeddings(change(query), None if gallery is None else change(gallery))


def embed_dataset(
    embed: Callable[[jax.Array], jax.Array],
    dataset: Dataset,
    batch_size: int,
    sharding: jax.sharding.NamedSharding,
    shapes: tuple[Shape, ...] | None = None,
) -> Embeddings:
    """Embeds the test images of a data set. Arguments as for `embed_split`."""
    how = (batch_size, sharding, shapes)
    query = embed_split(embed, dataset.query, "embedding queries", *how)
    if dataset.gallery is None:
        return Embeddings(query, None)
    return Embeddings(query, embed_split(embed, dataset.gallery, "embedding gallery", *how))


def embed_split(
    embed: Callable[[jax.Array], jax.Array],
    split: Split,
    title: str,
    batch_size: int,
    sharding: jax.sharding.NamedSharding,
    shapes: tuple[Shape, ...] | None = None,
) -> np.ndarray:
    """Embeds the images of a split as squares, or, given shapes, each at the nearest of these.

    Other arguments as for `embed_images`. Returns [N, D] float32.
    """
    if shapes is None or split.encoded is None:
        return embed_images(embed, split.images, batch_size, sharding, title)
    found, rows, batch_size = [], [], 16  # one size and one program a shape, in every split
    for some, images in cache.by_shape(split.encoded, shapes):
        height, width = images.shape[1:3]
        found.append(
            embed_images(embed, images, batch_size, sharding, f"{title} {width} × {height}")
        )
        rows.append(some)
    return np.concatenate(found)[np.argsort(np.concatenate(rows))]


def embed_images(
    embed: Callable[[jax.Array], jax.Array],
    images: np.ndarray | Images,
    batch_size: int,
    sharding: jax.sharding.NamedSharding,
    title: str = "embedding",
) -> np.ndarray:
    """Embeds all images of a split, [N, S, S, 3] uint8, in batches over all devices.

    `embed` is a jitted function, [B, S, S, 3] uint8 → [B, D]; the size of a batch is rounded up to
    a multiple of the devices. Returns [N, D] float32, in the order of the images.
    """
    devices = sharding.mesh.size
    batch_size = -(-batch_size // devices) * devices
    count = len(images)
    rows = processes.local_rows(sharding, batch_size)

    def make_batch(i):
        chosen = np.arange(i * batch_size, min((i + 1) * batch_size, count))
        # The last batch is filled up: another shape would compile once more.
        return (images[np.resize(chosen, batch_size)[rows]],)

    parts = []
    with console.progress(count, title, log_every=None) as bar:
        for (batch,) in prefetch(make_batch, range(-(-count // batch_size)), sharding):
            parts.append(processes.to_host(embed(batch)))
            bar.update(min(batch_size, count - bar.n))
    return np.concatenate(parts)[:count].astype(np.float32)


def embed_raw_pixels(
    dataset: Dataset, batch_size: int, sharding: jax.sharding.NamedSharding
) -> Embeddings:
    """The pixels of the test images as embeddings. Arguments as for `embed_images`."""
    found = embed_dataset(embed_pixels, dataset, batch_size, sharding)
    parts = [part.reshape(len(part), -1, 3) for part in found if part is not None]
    if all(np.all(part == part[..., :1]) for part in parts):
        # Gray images hold every number three times.
        found = found.each(lambda vectors: vectors[:, ::3])
    return found


@jax.jit
def embed_pixels(images: jax.Array) -> jax.Array:
    """The baseline without any network: pixels, at 32 × 32 at most, as float32 [B, D]."""
    side = min(32, images.shape[1])
    shape = (len(images), side, side, 3)
    return jax.image.resize(images.astype(jnp.float32), shape, "linear").reshape(len(images), -1)


def nearest(
    embeddings: Embeddings,
    dataset: Dataset,
    k: int,
    rows: np.ndarray | slice = slice(None),
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k nearest neighbours of the queries `rows` [R], or fewer if there are not so many.

    Returns what `retrieval.top_k` does: similarities and positions in the gallery (among the
    queries, if there is none), [R, k] each, never the query itself.
    """
    own, (query, gallery) = dataset.own_rows(), embeddings
    gallery = query if gallery is None else gallery
    k, exclude = min(k, len(gallery) - (own is not None)), None if own is None else own[rows]
    return retrieval.top_k(query[rows], gallery, k, exclude=exclude, mesh=mesh)


def ranking_inputs(embeddings: Embeddings, dataset: Dataset) -> dict:
    """Returns embeddings, labels and ids as `metrics` takes them."""
    arrays = {"query": embeddings.query, "query_labels": dataset.query.labels}
    if embeddings.gallery is None:
        return arrays
    split = dataset.query if dataset.gallery is None else dataset.gallery
    arrays |= {"gallery": embeddings.gallery, "gallery_labels": split.labels}
    own = dataset.own_rows()
    if own is not None:
        rows = np.arange(len(split.labels))
        # Queries that are not in the gallery have ids of their own.
        elsewhere = len(rows) + np.arange(len(own))
        arrays |= {"query_ids": np.where(own >= 0, own, elsewhere), "gallery_ids": rows}
    return arrays


def save_embeddings(path: str | Path, embeddings: Embeddings, dataset: Dataset) -> None:
    """Writes vectors with ids and labels for other tools: `numpy.load(path)["query"]`.

    The arrays are query [N, D], query_labels [N], query_ids [N], and the same for a gallery.
    """
    arrays = {}
    for name, vectors in embeddings._asdict().items():
        split = getattr(dataset, name)
        if vectors is not None and split is not None:
            arrays[name] = vectors
            arrays[f"{name}_labels"] = split.labels
            arrays[f"{name}_ids"] = np.array(split.ids)
    with files.replacing(path) as part:
        np.savez(part, **arrays)
