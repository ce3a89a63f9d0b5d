"""Evaluation: embed the test images, then see at which rank the first true match stands."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from cgd_jax import complementarity, metrics, processes, rerank
from cgd_jax.augment import Normalization, center_crop, normalize
from cgd_jax.combination import l2_normalize
from cgd_jax.datasets import Dataset
from cgd_jax.input_pipeline import prefetch
from cgd_jax.models.cgd import CGD, Output


class Embeddings(NamedTuple):
    """Vectors of the test images, aligned with the splits of the data set."""

    query: np.ndarray  # [N, D] float32
    gallery: np.ndarray | None  # [G, D] float32; None: queries search each other


def embed_model(
    model: CGD,
    variables: dict,
    normalization: Normalization,
    image_size: int,
    vector: str = "embedding",
    flip: bool = False,
    scales: tuple[float, ...] = (1.0,),
) -> Callable[[jax.Array], jax.Array]:
    """The trained (or untrained) network as a function: [B, S, S, 3] uint8 → [B, D].

    Args:
      model: the network.
      variables: its weights and BatchNorm statistics.
      normalization: of the pixels, which belongs to the weights.
      image_size: what the network sees; of larger images it is the centre.
      vector: which of its vectors is compared, see `select_vector`.
      flip: whether the vector of the mirrored image is added.
      scales: factors of `image_size`; the vectors of all of them are added.

    Returns:
      A jitted function; its vectors have unit length.
    """
    return lambda images: _embed(
        model, variables, normalization, images, image_size, vector, flip, scales
    )


@partial(jax.jit, static_argnames=("model", "image_size", "vector", "flip", "scales"))
def _embed(model, variables, normalization, images, image_size, vector, flip, scales):
    images = normalize(center_crop(images, image_size), normalization)
    views = []
    for scale in scales:
        side = round(scale * image_size)
        shape = (len(images), side, side, 3)
        view = images if side == image_size else jax.image.resize(images, shape, "linear")
        views += [view, view[:, :, ::-1]] if flip else [view]

    def embed(view):
        output = model.apply(variables, view, return_descriptors=vector != "embedding")
        return l2_normalize(select_vector(output, model.descriptors, vector))

    return l2_normalize(sum(map(embed, views)))


def vectors_of(descriptors: str, combination: str) -> list[str]:
    """The names that `select_vector` knows for a descriptor set and a combination."""
    names = ["embedding", "descriptors", "first_descriptor"]
    names += [f"descriptor_{letter}" for letter in descriptors]
    return names + [f"branch_{letter}" for letter in branches_of(descriptors, combination)]


def branches_of(descriptors: str, combination: str) -> str:
    """The letters of the parts of the embedding, in their order; "" if they are mixed."""
    return descriptors if combination in ("concat", "separate") else ""


def select_vector(output: Output, descriptors: str, vector: str) -> jax.Array:
    """One of the vectors that the network computes on its way.

    Args:
      output: of the network, with its descriptors.
      descriptors: the letters of the descriptor set.
      vector: "embedding", what is trained; "descriptors", all descriptors as they come
        out of the pooling, before the FC layers, each normalized; "descriptor_S", one
        of them; "first_descriptor", the one that feeds the auxiliary module; "branch_S",
        the part of the embedding that comes from one of them.

    Returns:
      [B, D].
    """
    if vector == "first_descriptor":
        vector = f"descriptor_{descriptors[0]}"
    kind, _, letter = vector.partition("_")
    if kind == "embedding":
        return output.embedding
    if kind == "branch":
        return jnp.split(output.embedding, len(descriptors), 1)[descriptors.index(letter)]
    chosen = descriptors if kind == "descriptors" else letter
    chosen = [output.descriptors[descriptors.index(letter)] for letter in chosen]
    return jnp.concatenate([l2_normalize(d.astype(jnp.float32)) for d in chosen], 1)


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

    rows = processes.local_rows(sharding, batch_size)

    def make_batch(i):
        chosen = np.arange(i * batch_size, min((i + 1) * batch_size, count))
        # The last batch is filled up: another shape would compile once more.
        return (images[np.resize(chosen, batch_size)[rows]],)

    parts = []
    with tqdm(total=count, desc=title, unit="image", leave=False, disable=None) as bar:
        for (batch,) in prefetch(make_batch, range(-(-count // batch_size)), sharding):
            parts.append(processes.to_host(embed(batch)))
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


def embed_raw_pixels(
    dataset: Dataset, batch_size: int, sharding: jax.sharding.NamedSharding
) -> Embeddings:
    """The pixels of the test images as embeddings. Arguments as for `embed_images`."""
    query, gallery = embed_dataset(embed_pixels, dataset, batch_size, sharding)
    parts = [part.reshape(len(part), -1, 3) for part in (query, gallery) if part is not None]
    if all(
        np.array_equal(p[..., 0], p[..., 1]) and np.array_equal(p[..., 1], p[..., 2]) for p in parts
    ):
        # Gray images hold every number three times.
        query, gallery = query[:, ::3], None if gallery is None else gallery[:, ::3]
    return Embeddings(query, gallery)


def recall(
    embeddings: Embeddings, dataset: Dataset, ks: tuple[int, ...], **options
) -> dict[str, float]:
    """Recall@K of the test images, all that is measured while training.

    Args:
      embeddings: from `embed_dataset`.
      dataset: the data set that was embedded.
      ks: the numbers of neighbours K.
      **options: precision and mesh of `metrics.evaluate`.

    Returns:
      {"recall@1": between 0 and 1, ...}.
    """
    recalls = metrics.recall_at_k(**_measured(embeddings, dataset), ks=ks, **options)
    return {f"recall@{k}": value for k, value in recalls.items()}


def measure(embeddings: Embeddings, dataset: Dataset, config, **options) -> dict:
    """All metrics of the test images: `metrics.evaluate` as a config wants it.

    Args:
      embeddings: from `embed_dataset`.
      dataset: the data set that was embedded.
      config: the `eval` part of an experiment's config.
      **options: of `metrics.evaluate`.

    Returns:
      Its dict.
    """
    return metrics.evaluate(
        **_measured(embeddings, dataset), ks=config.ks, precision=config.precision, **options
    )


def measure_branches(
    embeddings: Embeddings, dataset: Dataset, descriptors: str, config, **options
) -> dict:
    """How the branches of the embedding complement one another.

    Args:
      embeddings: from `embed_dataset`, of a network whose branches lie side by side, see
        `branches_of`.
      dataset: the data set that was embedded.
      descriptors: the letters of the descriptor set.
      config: the `eval` part of an experiment's config.
      **options: of `complementarity.measure`.

    Returns:
      Its dict.
    """
    return complementarity.measure(
        **_measured(embeddings, dataset),
        names=descriptors,
        bootstrap=config.bootstrap,
        precision=config.precision,
        **options,
    )


def _measured(embeddings: Embeddings, dataset: Dataset) -> dict:
    """Embeddings and labels as `metrics` takes them."""
    measured = {"query": embeddings.query, "query_labels": dataset.query.labels}
    if embeddings.gallery is None:
        return measured
    if dataset.gallery is not None:
        labels = dataset.gallery.labels
        return measured | {"gallery": embeddings.gallery, "gallery_labels": labels}
    # The queries search themselves, under other vectors: known by their positions.
    itself = np.arange(len(dataset.query.labels))
    return measured | {
        "gallery": embeddings.gallery,
        "gallery_labels": dataset.query.labels,
        "query_ids": itself,
        "gallery_ids": itself,
    }


def postprocess(embeddings: Embeddings, training: np.ndarray | None, config, mesh) -> Embeddings:
    """Whitening, database-side augmentation and query expansion, those that a config wants.

    Args:
      embeddings: from `embed_dataset`.
      training: [N, D] of the training images; needed for whitening only.
      config: the `eval` part of an experiment's config.
      mesh: whose devices share the work.

    Returns:
      Embeddings to measure in place of the given ones.
    """
    query, gallery = embeddings
    if config.whitening_dim:
        mean, projection = rerank.learn_whitening(training, config.whitening_dim)
        query = rerank.whiten(query, mean, projection)
        gallery = None if gallery is None else rerank.whiten(gallery, mean, projection)
    k, alpha = config.database_augmentation, config.alpha
    if k and gallery is not None:
        gallery = rerank.augment_database(gallery, k, alpha, mesh=mesh)
    elif k:  # the queries are the database
        query = rerank.augment_database(query, k, alpha, mesh=mesh)
    k = config.query_expansion
    if k:
        # Queries that search each other stay themselves as a database: a pair of which
        # both were moved towards the other would count its likeness twice.
        itself = np.arange(len(query)) if gallery is None else None
        database = query if gallery is None else gallery
        query = rerank.expand_queries(query, database, k, alpha, exclude=itself, mesh=mesh)
        gallery = database
    return Embeddings(query, gallery)


def reranked_recall(
    embeddings: Embeddings, dataset: Dataset, ks: tuple[int, ...], mesh
) -> dict[str, float]:
    """Recall@K after k-reciprocal re-ranking of the nearest neighbours; see `recall`."""
    query, gallery = embeddings
    itself = dataset.gallery is None
    exclude = np.arange(len(query)) if itself and gallery is not None else None
    k = min(max(100, *ks), len(query if gallery is None else gallery) - itself)
    index = rerank.k_reciprocal(query, gallery, k, exclude=exclude, mesh=mesh)[1]
    labels = dataset.query.labels if itself else dataset.gallery.labels
    recalls = metrics.recall_of_ranking(index, dataset.query.labels, labels, ks, itself)
    return {f"recall@{k}": value for k, value in recalls.items()}


def save_embeddings(path: str | Path, embeddings: Embeddings, dataset: Dataset) -> None:
    """Writes vectors with ids and labels for other tools: `numpy.load(path)["query"]`.

    Args:
      path: of the .npz; its arrays are query [N, D], query_labels [N], query_ids [N],
        and the same for a gallery.
      embeddings: from `embed_dataset`.
      dataset: the data set that was embedded.
    """
    arrays = {}
    for name, vectors in embeddings._asdict().items():
        split = getattr(dataset, name)
        if vectors is not None and split is not None:
            arrays[name] = vectors
            arrays[f"{name}_labels"] = split.labels
            arrays[f"{name}_ids"] = np.array(split.ids)
    with open(f"{path}.tmp", "wb") as file:
        np.savez(file, **arrays)
    os.replace(f"{path}.tmp", path)


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
