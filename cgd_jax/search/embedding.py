"""Images on their way to vectors: read ahead by all cores while the device embeds.

All of search that needs JAX to make vectors is here, and imported when there are images to embed.
"""

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import numpy as np

from cgd_jax import network as networks
from cgd_jax import rerank
from cgd_jax.data.images import Box
from cgd_jax.network import BATCHES, Network, enough
from cgd_jax.runtime.console import progress
from cgd_jax.runtime.errors import InputError
from cgd_jax.runtime.threads import CORES, parallel
from cgd_jax.search import images
from cgd_jax.search.images import Listed
from cgd_jax.search.stores import Whitening

SAMPLE = 5000  # images that a whitening is learned from, at most
Item = TypeVar("Item")


class Embedder(NamedTuple):
    """What vectors are made by; an index is one as well, which opens its network when asked."""

    network: Network
    whitening: Whitening | None = None


def opened(model: Network | str | Path | None, vector: str | None, **seen: Any) -> Network:
    """Returns a network, see `network.open_network`; one that is open already as it is."""
    return model if isinstance(model, Network) else networks.open_network(model, vector, **seen)


def whitened(vectors: np.ndarray, by: Whitening | None) -> np.ndarray:
    """Returns vectors [B, D] of a network as an index holds them."""
    return vectors if by is None else rerank.whiten(vectors, *by)


def read_and_embed(
    items: Sequence[Item],
    read: Callable[[Item], Any],
    embedder: Any,
    what: str | None = None,
    crop: Box | None = None,
) -> Iterator[tuple[Item, Any, np.ndarray | None]]:
    """Reads images ahead in threads, while the device embeds those that could be read.

    `read` returns the bytes of a file, or what `images.read` makes of them; anything else where
    there is nothing to embed. The network of an `Embedder` is asked for when there is. Yields every
    item with the fields that `images.read` found and the vector [D], or with what `read` returned,
    or why it cannot be read, and None. `what` is said to be done by a progress bar.
    """
    opening = Lock()

    def prepared(item: Item) -> Any:
        try:
            data = read(item)
        except (OSError, ValueError) as error:  # it may have vanished meanwhile
            return error
        if not isinstance(data, bytes):
            return data
        with opening:  # by one thread; an index of another network is no matter of the file
            size = embedder.network.size
        try:
            return images.read(data, size, crop)
        except ValueError as error:
            return error

    def embedded() -> Iterator[tuple[Item, Any, np.ndarray]]:
        vectors = embedder.network.embed_pixels([pixels for _, (pixels, _) in waiting])
        vectors = whitened(vectors, embedder.whitening)
        for (item, (_, fields)), vector in zip(waiting, vectors, strict=True):
            yield item, fields, vector
        waiting.clear()

    waiting: list[tuple[Item, tuple[np.ndarray, dict]]] = []
    # So many are ahead that the next batch is there when the device is free.
    outcomes = parallel(prepared, items, 2 * BATCHES[-1] // CORES)
    with progress(len(items), what) if what and items else contextlib.nullcontext() as bar:
        for item, outcome in zip(items, outcomes, strict=True):
            if bar:
                bar.update()
            if not isinstance(outcome, tuple):
                yield item, outcome, None
                continue
            waiting.append((item, outcome))
            if len(waiting) == enough():
                yield from embedded()
        if waiting:
            yield from embedded()


def learn_whitening(network: Network, listed: list[Listed], dimension: int, by: str) -> Whitening:
    """Learns a whitening from some of the images; they say what matters among them."""
    listed = [listed[i] for i in np.random.default_rng(0).permutation(len(listed))]
    if by == "pairs":  # of whole classes, in any order
        listed = [row for row in listed if row[0].label]
        listed.sort(key=lambda row: zlib.crc32(str(row[0].label).encode(errors="replace")))
    if not dimension < min(network.dimension, len(listed)):
        raise InputError(
            f"--whiten={dimension}: must be below the dimension of the vectors "
            f"({network.dimension}) and the number of images ({len(listed):,})."
        )
    read, what = lambda listed: images.content_of(listed[1]), "learning the whitening"
    outcomes = read_and_embed(listed[:SAMPLE], read, Embedder(network), what)
    found = [(record.label, v) for (record, _), _, v in outcomes if v is not None]
    if len(found) <= dimension:
        raise InputError(f"--whiten={dimension}: only {len(found):,} images can be read.")
    labels, vectors = zip(*found, strict=True)
    if by == "pca":
        return rerank.learn_whitening(np.stack(vectors), dimension)
    pairs = rerank.matching_pairs(labels)
    if not len(pairs):
        raise InputError("--whitening=pairs: no two images share a label, by folder or list.")
    return rerank.learn_pair_whitening(np.stack(vectors), pairs, dimension)
