"""An index: images and their vectors, to search by an image.

    index = Index.open("runs/index")
    for hit in index.search("query.jpg", k=5, where="label = 'shoes'"):
        print(hit.similarity, hit.path)

The vectors of an index are those of one network, which it remembers by the hash of its weights:
it is never searched with another. JAX is imported when there is something to embed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pyarrow as pa
from PIL import Image

from cgd_jax.data.images import is_one, listed
from cgd_jax.runtime.errors import InputError
from cgd_jax.search import about, digests, indexing, stores
from cgd_jax.search import images as reading
from cgd_jax.search.about import IndexInfo
from cgd_jax.search.indexing import Changes
from cgd_jax.search.opening import open_store, writing
from cgd_jax.search.stores import COLUMNS, HIT_COLUMNS, LISTED, Hit, Record, Store, Whitening

if TYPE_CHECKING:
    from cgd_jax.network import Network

__all__ = ["Index", "IndexInfo", "Query"]

# As many equally similar images are put in order; a Milvus server finds 16,384 at once.
EQUALS = 16_000

# An image as `data.images` reads it: a file, its bytes, of Pillow, or pixels [H, W, 3].
Query = str | Path | bytes | Image.Image | np.ndarray


class Index:
    """Images and their vectors in a database; `open` and `create` make one, `info` is of it."""

    def __init__(self, store: Store, network: Network | str | Path | None = None):
        self.address, self._store = store.address, store
        self.info, self.whitening = about.read(store)
        self._network = network
        self._remembered: tuple[int, list[str], np.ndarray] | None = None

    def __len__(self) -> int:
        return self.count()

    def __repr__(self) -> str:
        info = self.info
        compressed = f", compress={info.compress!r}" if info.compress else ""
        return (
            f"Index({self.address!r}, network={info.network!r}, vector={info.vector!r}, "
            f"dimension={info.dimension}{compressed})"
        )

    @classmethod
    def open(
        cls,
        address: str | Path,
        model: Network | str | Path | None = None,
        *,
        create: bool = False,
        vector: str | None = None,
    ) -> Index:
        """Opens an index.

        Args:
          address: of the index, see `opening.open_store`.
          model: the network, see `network.open_network`. None is the one that the index was
            made with; of a new index, the packaged EfficientNet-Lite0.
          create: whether to make the index if there is none.
          vector: as `network.open_network` takes it; None likewise.

        Raises:
          NoIndexError, InputError: there is no index, or it is of another network.
          StoreError: it is damaged, or cannot be reached or read.
          ImportError: the package of the database is missing.
        """
        try:
            store = open_store(str(address))
        except stores.NoIndexError:
            if not create:
                raise
            from cgd_jax.search.embedding import opened

            return cls.create(address, opened(model, vector))
        index = cls(store, model)
        if isinstance(model, str | Path):  # known by its weights, without building it
            from cgd_jax.network import identify

            name, weights_hash = identify(model)
            about.check(index.info, name, {"weights_hash": weights_hash}, index.address)
        elif model is not None:
            about.check_network(index.info, model, index.address)
        if vector is not None:
            about.check(index.info, index.info.network, {"vector": vector}, index.address)
        return index

    @classmethod
    def create(
        cls,
        address: str | Path,
        network: Network,
        *,
        precision: str = "float32",
        whitening: Whitening | None = None,
        whitened_by: str = "pca",
        compress: str | None = None,
    ) -> Index:
        """Makes an empty index of a network's vectors; one that is there already is opened.

        Their precision is "float32" or "float16"; a whitening, and what it was learned by, of
        "pca" or "pairs", is applied to them. From some size on, searches keep them in memory
        compressed: "pq" by product quantization (https://hal.inria.fr/inria-00514462), "binary" to
        a bit a number by RaBitQ (https://arxiv.org/abs/2405.12497); the best are compared exactly.
        Raises as `open`; InputError: D is no multiple of 8, which compression needs.
        """
        info = IndexInfo(
            network=network.name,
            dimension=network.dimension if whitening is None else whitening[1].shape[1],
            precision=precision,
            whitened_from=None if whitening is None else network.dimension,
            created=datetime.now(UTC).isoformat(timespec="microseconds"),
            whitened_by=whitened_by,
            compress=compress,
            **about.remembered_of(network),
        )
        if compress and (compress not in stores.COMPRESSED or info.dimension % 8):
            raise InputError(
                f"--compress={compress}: it is {' or '.join(stores.COMPRESSED)}, of vectors whose "
                f"length is a multiple of 8, not {info.dimension}; --whiten= gives them another."
            )
        texts = about.as_texts(info, whitening)
        index = cls(open_store(str(address), texts, info.dimension), network)
        about.check_network(index.info, network, index.address)
        return index

    @property
    def network(self) -> Network:
        """The network, opened when it is needed first.

        Raises InputError: it is no longer where it was, another one is there now, or it would have
        to be downloaded though only the index, which may be a stranger's, names it.
        """
        if self._network is None or isinstance(self._network, str | Path):
            self._network = about.open_network(self.info, self._network, self.address)
        return self._network

    @property
    def store(self) -> Store:
        """The database, looked at every time: StoreError if it is damaged, or another index's.

        One that came in its place may have the same number for a version.
        """
        digests.check(self.address)
        if not about.is_said(self.info, self._store):
            raise stores.StoreError(
                f"The index {self.address} was replaced by another one after it had been opened. "
                f"Open it again; if it is served, start the server again."
            )
        return self._store

    def embed(self, images: Query | Sequence[Query]) -> np.ndarray:
        """Returns the vectors of images, [B, D] float32 of unit length; see `Network.embed`."""
        return self._whitened(self.network.embed(images))

    def embed_pixels(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the vectors of pixels of `network.size` as `embed` does."""
        return self._whitened(self.network.embed_pixels(pixels))

    def _whitened(self, vectors: np.ndarray) -> np.ndarray:
        from cgd_jax.search import embedding

        return embedding.whitened(vectors, self.whitening)

    @overload
    def search(
        self, query: Query, k: int = 20, where: str | None = None, exact: bool = False
    ) -> list[Hit]: ...

    @overload
    def search(
        self, query: list[Any], k: int = 20, where: str | None = None, exact: bool = False
    ) -> list[list[Hit]]: ...

    def search(self, query, k=20, where=None, exact=False):
        """Finds the images most similar to an image, or to each of a list of them.

        Args:
          query: one image, its vector [D], or a list of images; k are found, at most.
          where: which of them to look at, as SQL: "label = 'shoes' AND width > 500".
          exact: whether to compare with every image, where the index is so large that it
            does not do so anyway. All vectors are then read into memory.

        Returns:
          The most similar first; of several queries, a list for each.

        Raises:
          FileNotFoundError, InputError: something is no image, or `where` is not understood.
          StoreError: the index cannot be read.
        """
        if getattr(query, "ndim", 0) == 1:
            return self.search_vectors(np.asarray(query)[None], k, where, exact)[0]
        found = self.search_vectors(self.embed(query), k, where, exact)
        return found[0] if is_one(query) else found

    def search_vectors(
        self, vectors: np.ndarray, k: int = 20, where: str | None = None, exact: bool = False
    ) -> list[list[Hit]]:
        """Finds the images most similar to each of [B, D] vectors, as `search` does.

        Of equally similar images those with the lower ids come first, so that a larger k only
        adds to what a smaller one finds. Similarities have six digits: more are noise.
        """
        if k < 1:
            raise InputError(f"k must be at least 1, got {k}.")
        vectors = self._checked(vectors)
        if not len(vectors):  # which the databases do not take
            return []
        store = self.store
        search = self._search_in_memory if exact and store.approximate() else store.search
        limit = k + 1
        while True:
            found = [_in_order(hits) for hits in search(vectors, limit, _composed(where))]
            # A database cuts off between equals where it likes: what is asked for must end
            # beyond them.
            cut = [len(h) == limit and h[k - 1].similarity == h[-1].similarity for h in found]
            if not any(cut) or limit >= EQUALS:
                return [hits[:k] for hits in found]
            limit = min(4 * limit, EQUALS)

    def _checked(self, vectors: np.ndarray) -> np.ndarray:
        vectors = np.asarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.info.dimension:
            raise ValueError(
                f"the vectors of this index are [{self.info.dimension}], not "
                f"{list(vectors.shape[1:])}."
            )
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not np.all(np.isfinite(norms) & (norms > 0)):
            raise ValueError("a vector to search by is zero, NaN or infinite.")
        return vectors / norms

    def _search_in_memory(self, vectors: np.ndarray, k: int, where: str | None) -> list[list[Hit]]:
        from cgd_jax import retrieval

        ids, gallery = self.vectors(where)
        if not ids:
            return [[] for _ in vectors]
        similarity, at = retrieval.top_k(vectors, gallery, min(k, len(ids)))
        known = self.hits(ids[i] for i in np.unique(at))
        return [
            [known[ids[i]]._replace(similarity=float(s)) for s, i in zip(*row, strict=True)]
            for row in zip(similarity, at, strict=True)
        ]

    def hits(self, ids: Iterable[str]) -> dict[str, Hit]:
        """Returns images of the index by id, as hits of similarity 0."""
        found = {}
        for where in stores.among(ids):
            for batch in self.store.read(HIT_COLUMNS, where):
                found |= {row["id"]: Hit(similarity=0.0, **row) for row in batch.to_pylist()}
        return found

    def count(self, where: str | None = None) -> int:
        """Counts the images, or those that `where` selects."""
        return self.store.count(_composed(where))

    def get(self, id: str) -> Record | None:
        """Returns what is known of an image; None if there is none of this id."""
        with contextlib.suppress(KeyError):
            return Record(**self._row(id, list(COLUMNS)).to_pylist()[0])
        return None

    def thumbnail(self, id: str) -> bytes:
        """Returns a small JPEG of an image; KeyError if there is none of this id."""
        return self._row(id, ["thumbnail"])["thumbnail"][0].as_py()

    def vector(self, id: str) -> np.ndarray:
        """Returns the vector [D] of an image; KeyError if there is none of this id."""
        return stores.vectors_in(self._row(id, ["vector"]))[0]

    def _row(self, id: str, names: list[str]) -> pa.RecordBatch:
        for batch in self.store.read(names, f"id = {stores.quoted(id)}"):
            if batch.num_rows:
                return batch
        raise KeyError(f"the index has no image {id!r}")

    def labels(self) -> dict[str, int]:
        """Counts the images of every label, in alphabetical order."""
        return stores.counted([batch["label"] for batch in self.store.read(["label"])])

    def vectors(self, where: str | None = None) -> tuple[list[str], np.ndarray]:
        """Returns ids, and their vectors [N, D] float32 of unit length; `where` as for `search`.

        Those of the whole index stay in memory until it changes.
        """
        store = self.store
        version = store.version()
        if where is None and self._remembered is not None and self._remembered[0] == version:
            return self._remembered[1:]
        ids, pieces = [], [np.zeros((0, self.info.dimension), np.float32)]
        for batch in store.read(["id", "vector"], _composed(where)):
            ids += batch["id"].to_pylist()
            pieces.append(stores.vectors_in(batch))
        vectors = np.concatenate(pieces)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        if where is None and version is not None:
            self._remembered = version, ids, vectors
        return ids, vectors

    def to_arrow(self) -> pa.Table:
        """Returns all records, but for thumbnails, and vectors as an Arrow table."""
        return stores.read_table(self.store, [*LISTED, "vector"], self.info.dimension)

    def add(
        self, images: Query | Iterable[Query], labels: Sequence[str | None] | None = None
    ) -> list[str]:
        """Adds images, whose labels may be known; returns their ids.

        Those of a path that is there already are replaced. Raises ValueError if one is no image,
        and adds none; BusyError if somebody else writes to the index.
        """
        images = listed(images)
        size = self.network.size if images else 0
        labels = [None] * len(images) if labels is None else labels
        ids, rows = [], {}
        for image, label in zip(images, labels, strict=True):
            pixels, content = reading.read(image, size)
            record = Record(content["hash"][:20], label=stores.composed(label))
            if isinstance(image, str | Path):
                path = Path(image).absolute()
                record = reading.record_of(path, str(path), label)
            ids.append(record.id)
            # An image that is given twice would be two rows to insert.
            rows[record.id] = record._replace(**content), pixels
        if rows:
            vectors = self.embed_pixels([pixels for _, pixels in rows.values()])
            with writing(self.address):
                self.write([record for record, _ in rows.values()], vectors)
        return ids

    def write(self, records: Sequence[Record], vectors: np.ndarray) -> None:
        """Writes images of distinct ids with their vectors [N, D], within `writing`."""
        self.store.upsert(stores.as_table(records, vectors))

    def remove(self, ids: Iterable[str]) -> None:
        """Removes images; unknown ids are ignored. Raises BusyError as `add`."""
        with writing(self.address):
            self.store.delete(list(ids))

    def update(
        self, *sources: str | Path, watch: Callable[[int, int], None] | None = None
    ) -> Changes:
        """Brings the index up to date with folders, archives and CSVs; see `filling.update`."""
        with writing(self.address), reading.listed(sources, self.address) as listing:
            return indexing.update(self, listing, watch=watch)


def _in_order(hits: list[Hit]) -> list[Hit]:
    rounded = [hit._replace(similarity=round(hit.similarity, 6)) for hit in hits]
    return sorted(rounded, key=lambda hit: (-hit.similarity, hit.id))


def _composed(where: str | None) -> str | None:
    """Writes the labels of a condition as they are kept; those of files have either form."""
    columns = re.sub(r"'(?:[^']|'')*'", "", where or "")
    return where if re.search(r"\b(path|source)\b", columns) else stores.composed(where)
