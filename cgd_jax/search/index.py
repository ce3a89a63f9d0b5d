"""An index: pictures and their vectors, to search by a picture.

    index = Index.open("runs/index")
    for hit in index.search("query.jpg", k=5, where="label = 'shoes'"):
        print(hit.similarity, hit.path)

The vectors of an index are those of one network, which it remembers by the hash of its weights:
it is never searched with another.
"""

import base64
import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from cgd_jax.runtime.threads import CORES, parallel
from cgd_jax.search import pictures, stores
from cgd_jax.search.stores import COLUMNS, Columns, Hit, Store, open_store

if TYPE_CHECKING:
    import pyarrow as pa

    from cgd_jax.network import Network

__all__ = ["Index", "IndexInfo", "Query", "Record"]

# An accelerator embeds batches of these sizes, each of which is compiled once; any number is a sum
# of them. On a CPU every core embeds one image at a time: in a batch, an image takes longer.
BATCHES = (1, 16, 128)

# A file, an image, its pixels [H, W, 3] uint8, or a vector [D] of floats.
Query = str | Path | Image.Image | np.ndarray
Whitening = tuple[np.ndarray, np.ndarray]  # mean and projection, see `rerank.learn_whitening`


class IndexInfo(NamedTuple):
    """What an index holds; it is written when the index is made and never changes."""

    network: str  # the name of a package, a path, or a repository
    weights_hash: str
    vector: str  # which of the network's vectors, see `models.cgd.select_vector`
    dimension: int  # of the vectors in the index
    image_size: int  # pixels, what the network sees
    resize: int  # pixels: images are resized to this square, of which it sees the center
    normalization: dict[str, list[float]]  # of the pixels
    precision: str  # of the vectors in the index: float32 or float16
    whitened_from: int | None  # dimension of the network's vectors, where these are whitened
    created: str  # ISO 8601


class Record(NamedTuple):
    """What an index knows of a picture, beside its vector and thumbnail."""

    id: str
    path: str
    label: str | None
    size: int  # bytes
    hash: str  # of the file
    width: int  # pixels, as displayed
    height: int


class Index:
    """Pictures and their vectors in a database. `open` and `create` make one.

    Attributes:
      info: an `IndexInfo`.
      store: the database.
    """

    def __init__(self, store: Store, network: "Network | str | None" = None):
        self.store = store
        self.info = _read_info(store)
        self._whitening = _read_whitening(store)
        self._network = network
        self._everything: tuple[Any, list[Hit], np.ndarray] | None = None

    @classmethod
    def open(
        cls,
        address: str | Path,
        model: "Network | str | Path | None" = None,
        *,
        create: bool = False,
        vector: str | None = None,
    ) -> "Index":
        """Opens an index.

        Args:
          address: of the index, see `stores.open_store`.
          model: the network, see `network.open_network`. None is the one that the index was
            made with; of a new index, the packaged EfficientNet-Lite0.
          create: whether to make the index if there is none.
          vector: as `network.open_network` takes it; None likewise.

        Raises:
          FileNotFoundError: there is no index, or no such network.
          ValueError: the index is of another network.
          StoreError: the index cannot be reached or read.
          ImportError: the package of the database is missing.
        """
        try:
            store = open_store(str(address))
        except stores.NoIndexError:
            if not create:
                raise
            return cls.create(address, opened(model, vector))
        info = _read_info(store)
        if model is not None:
            if isinstance(model, str | Path):
                from cgd_jax import network

                name, found = network.identify(model)
            else:
                name, found, vector = model.name, model.weights_hash, vector or model.vector
            if found != info.weights_hash:
                raise ValueError(
                    f"The index {address} was made with the network {info.network} (weights "
                    f"{info.weights_hash}); it cannot be used with {name} (weights {found}), "
                    f"whose vectors mean something else. Use that network, or make another index "
                    f"with --index=."
                )
        if vector not in (None, info.vector):
            raise ValueError(
                f"The index {address} holds the vectors {info.vector} of {info.network}, not "
                f"{vector}. Leave --vector out, or make another index with --index=."
            )
        return cls(store, str(model) if isinstance(model, Path) else model)

    @classmethod
    def create(
        cls,
        address: str | Path,
        network: "Network",
        *,
        precision: str = "float32",
        whitening: Whitening | None = None,
    ) -> "Index":
        """Makes an empty index; one that is there already is opened.

        Args:
          address: of the index, see `stores.open_store`.
          network: whose vectors it is to hold.
          precision: of the vectors, "float32" or "float16".
          whitening: applied to the vectors, from `rerank.learn_whitening`.

        Raises:
          As `open`.
        """
        scale = network.normalization._asdict()
        info = IndexInfo(
            network=network.name,
            weights_hash=network.weights_hash,
            vector=network.vector,
            dimension=network.dimension if whitening is None else whitening[1].shape[1],
            image_size=network.image_size,
            resize=network.resize,
            normalization={name: np.asarray(value).tolist() for name, value in scale.items()},
            precision=precision,
            whitened_from=None if whitening is None else network.dimension,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        about = {"info": json.dumps(info._asdict())}
        if whitening is not None:
            buffer = io.BytesIO()
            np.savez(buffer, mean=whitening[0], projection=whitening[1])
            about["whitening"] = base64.b64encode(buffer.getvalue()).decode()
        return cls(open_store(str(address), about, info.dimension), network)

    @property
    def network(self) -> "Network":
        """The network, opened when it is needed first.

        Raises:
          FileNotFoundError: it is no longer where it was.
          ValueError: what is there now is another network.
        """
        if self._network is None or isinstance(self._network, str):
            source = self._network or self.info.network
            try:
                network = opened(source, self.info.vector)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"The index {self.store.address} was made with the network {source}, which is "
                    f"not there: {error} If it is elsewhere now, say so with --model=."
                ) from error
            if network.weights_hash != self.info.weights_hash:
                raise ValueError(
                    f"The index {self.store.address} was made with the network {source} (weights "
                    f"{self.info.weights_hash}), which has changed since (now "
                    f"{network.weights_hash}). Say with --model= where that network is, or make "
                    f"another index with --index=."
                )
            self._network = network
        return self._network

    def embed(self, images: Sequence[Image.Image | np.ndarray]) -> np.ndarray:
        """Returns the vectors of images, [B, D] float32 of unit length."""
        side = self.info.resize
        return self.embed_pixels(np.stack([pictures.read_image(im, side).pixels for im in images]))

    def embed_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Returns the vectors of [B, resize, resize, 3] uint8 as `embed` does."""
        vectors = embed_pixels(self.network, pixels)
        if self._whitening is None:
            return vectors
        from cgd_jax import rerank

        return rerank.whiten(vectors, *self._whitening)

    def vector_of(self, query: Query, crop: pictures.Box | None = None) -> np.ndarray:
        """Returns the vector [D] of a query; one that is a vector as it is.

        Args:
          query: what to search by.
          crop: the part of the image to search by, (x0, y0, x1, y1) in pixels.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is no image, or a vector of another size.
        """
        if isinstance(query, np.ndarray) and query.ndim == 1:
            return self._checked(query[None])[0]
        if isinstance(query, str | Path):
            try:
                pixels = pictures.decode(Path(query).read_bytes(), crop, self.info.resize)
            except ValueError as error:
                raise ValueError(f"{query}: {error}.") from error
        else:
            if crop is not None:
                query = query if isinstance(query, Image.Image) else Image.fromarray(query)
                left, top, right, bottom = map(round, crop)
                query = query.crop((left, top, right, bottom))
            pixels = pictures.read_image(query, self.info.resize).pixels
        return self.embed_pixels(pixels[None])[0]

    def search(
        self, query: Query, k: int = 20, where: str | None = None, exact: bool = False
    ) -> list[Hit]:
        """Finds the pictures most similar to a query.

        Args:
          query: what to search by.
          k: how many pictures, at most.
          where: which of them to look at, as SQL: "label = 'shoes' AND width > 500".
          exact: whether to compare with every picture, where the index is so large that it
            does not do so anyway.

        Returns:
          The most similar first.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the query is no image, or `where` is not understood.
          StoreError: the index cannot be read.
        """
        return self.search_vectors(self.vector_of(query)[None], k, where, exact)[0]

    def search_vectors(
        self, vectors: np.ndarray, k: int = 20, where: str | None = None, exact: bool = False
    ) -> list[list[Hit]]:
        """Finds the pictures most similar to each of [B, D] vectors, as `search` does."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        vectors = self._checked(vectors)
        if exact and (_on_accelerator() or not self.store.exact):
            return self._search_on_device(vectors, k, where)
        return self.store.search(vectors, k, where, exact)

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

    def _search_on_device(self, vectors: np.ndarray, k: int, where: str | None) -> list[list[Hit]]:
        """Searches exactly in memory, with `retrieval.top_k`."""
        from cgd_jax import retrieval

        hits, gallery = self.in_memory(where)
        if not hits:
            return [[] for _ in vectors]
        similarity, at = retrieval.top_k(vectors, gallery, min(k, len(hits)))
        return [
            [hits[i]._replace(similarity=float(s)) for s, i in zip(*row, strict=True)]
            for row in zip(similarity, at, strict=True)
        ]

    def in_memory(self, where: str | None) -> tuple[list[Hit], np.ndarray]:
        """Returns the pictures, as hits without similarity, and their vectors [N, D].

        What all pictures are stays in memory until they change.
        """
        version = self.store.version()
        if where is None and version is not None and self._everything is not None:
            if self._everything[0] == version:
                return self._everything[1:]
        hits, vectors = [], [np.zeros((0, self.info.dimension), np.float32)]
        for columns in self.store.read(["id", "label", "path", "vector"], where):
            rows = zip(columns["id"], columns["label"], columns["path"], strict=True)
            hits += [Hit(id, 0.0, label, path) for id, label, path in rows]
            vectors.append(np.asarray(columns["vector"]))
        gallery = np.concatenate(vectors)
        gallery /= np.maximum(np.linalg.norm(gallery, axis=1, keepdims=True), 1e-12)
        if where is None:
            self._everything = version, hits, gallery
        return hits, gallery

    def count(self, where: str | None = None) -> int:
        """Counts the pictures, or those that `where` selects."""
        return self.store.count(where)

    def get(self, id: str) -> Record | None:
        """Returns what is known of a picture; None if there is none of this id."""
        columns = self._row(id, Record._fields)
        return None if columns is None else Record(**columns)

    def thumbnail(self, id: str) -> bytes:
        """Returns a small JPEG of a picture; KeyError if there is none of this id."""
        return self._existing(id, "thumbnail")

    def vector(self, id: str) -> np.ndarray:
        """Returns the vector [D] of a picture; KeyError if there is none of this id."""
        return np.asarray(self._existing(id, "vector"))

    def labels(self) -> dict[str, int]:
        """Counts the pictures of every label, in alphabetical order."""
        counts = Counter()
        for columns in self.store.read(["label"]):
            counts.update(label for label in columns["label"] if label is not None)
        return dict(sorted(counts.items()))

    def vectors(self) -> tuple[list[str], np.ndarray]:
        """Returns all ids, and their vectors [N, D] float32."""
        hits, vectors = self.in_memory(None)
        return [hit.id for hit in hits], vectors

    def to_arrow(self) -> "pa.Table":
        """Returns all records and vectors as an Arrow table, for other tools."""
        import pyarrow as pa

        kinds = {str: pa.string(), int: pa.int64()}
        names = Record._fields
        fields = [pa.field(name, kinds[COLUMNS[name]]) for name in names]
        fields.append(pa.field("vector", pa.list_(pa.float32(), self.info.dimension)))
        batches = []
        for columns in self.store.read([*names, "vector"]):
            flat = pa.array(np.asarray(columns["vector"], np.float32).reshape(-1))
            vectors = pa.FixedSizeListArray.from_arrays(flat, self.info.dimension)
            arrays = [pa.array(columns[name], kinds[COLUMNS[name]]) for name in names]
            batches.append(pa.record_batch([*arrays, vectors], schema=pa.schema(fields)))
        return pa.Table.from_batches(batches, schema=pa.schema(fields))

    def add(
        self,
        images: Iterable[str | Path | Image.Image | np.ndarray],
        labels: Sequence[str | None] | None = None,
    ) -> list[str]:
        """Adds pictures; those of a path that is there already are replaced.

        Args:
          images: files, images of Pillow, or pixels [H, W, 3] uint8.
          labels: of each, if they are known.

        Returns:
          Their ids.

        Raises:
          ValueError: one is no image; nothing is added then.
          BlockingIOError: somebody else writes to the index.
        """
        images = list(images)
        labels = [None] * len(images) if labels is None else list(labels)
        rows = []
        for image, label in zip(images, labels, strict=True):
            path, size, modified = "", 0, 0
            if isinstance(image, str | Path):
                file = Path(image).absolute()
                path, status = str(file), file.stat()
                size, modified = status.st_size, status.st_mtime_ns
                try:
                    picture = pictures.read(file.read_bytes(), self.info.resize)
                except ValueError as error:
                    raise ValueError(f"{image}: {error}.") from error
            else:
                picture = pictures.read_image(image, self.info.resize)
            id = pictures.id_of(path) if path else picture.hash[:20]
            rows.append((pictures.File(id, path, label, Path(path), size, modified), picture))
        ids = [file.id for file, _ in rows]
        if rows:
            # A picture that is given twice would be two rows to insert.
            rows = list({file.id: (file, picture) for file, picture in rows}.values())
            vectors = self.embed_pixels(np.stack([picture.pixels for _, picture in rows]))
            with writing(self.store.address):
                self.write(rows, vectors, [""] * len(rows))
        return ids

    def write(
        self,
        rows: Sequence[tuple[pictures.File, pictures.Picture]],
        vectors: np.ndarray,
        sources: Sequence[str],
    ) -> None:
        """Writes pictures of distinct ids with their vectors [N, D], within `writing`.

        Args:
          rows: the files, and what was read of them.
          vectors: of each.
          sources: what each was listed from; vanished ones are looked for among the same.
        """
        columns: Columns = {
            "id": [file.id for file, _ in rows],
            "path": [file.path for file, _ in rows],
            "label": [file.label for file, _ in rows],
            "size": [file.size for file, _ in rows],
            "hash": [picture.hash for _, picture in rows],
            "width": [picture.width for _, picture in rows],
            "height": [picture.height for _, picture in rows],
            "source": list(sources),
            "modified": [file.modified for file, _ in rows],
            "thumbnail": [picture.thumbnail for _, picture in rows],
            "vector": vectors,
        }
        self.store.upsert(columns)

    def remove(self, ids: Iterable[str]) -> None:
        """Removes pictures; ids that there are not count for nothing.

        Raises:
          BlockingIOError: somebody else writes to the index.
        """
        ids = list(ids)
        if ids:
            with writing(self.store.address):
                self.store.delete(ids)

    def _row(self, id: str, names: Sequence[str]) -> dict[str, Any] | None:
        for columns in self.store.read(names, f"id = {stores.quoted(id)}"):
            if len(columns[names[0]]):
                return {name: columns[name][0] for name in names}
        return None

    def _existing(self, id: str, name: str) -> Any:
        row = self._row(id, [name])
        if row is None:
            raise KeyError(f"the index has no picture {id!r}")
        return row[name]


@contextlib.contextmanager
def writing(address: str) -> Iterator[None]:
    """Keeps other writers out of an index on this machine; elsewhere the database does.

    Raises:
      BlockingIOError: somebody else writes to the index.
    """
    if not stores.is_local(address) or address.endswith(".db"):  # milvus-lite has its own lock
        yield
        return
    from cgd_jax.runtime import locks

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locks.one_at_a_time(Path(address, ".lock"), wait=False))
        except BlockingIOError:
            raise BlockingIOError(
                f"Another process writes to the index {address}. Wait for it, or stop it; what it "
                f"has written stays."
            ) from None
        yield


def batch_sizes() -> tuple[int, ...]:
    """Returns how many images the device embeds at a time, each of which is compiled once."""
    return BATCHES if _on_accelerator() else (1,)


def enough() -> int:
    """Returns how many images, embedded together, keep the device busy."""
    return BATCHES[-1] if _on_accelerator() else 4 * CORES


def embed_pixels(network: "Network", pixels: np.ndarray) -> np.ndarray:
    """Embeds any number of images [B, resize, resize, 3] uint8: [B, D] float32."""
    sizes, batches, at = batch_sizes(), [], 0
    while at < len(pixels):
        size = max(size for size in sizes if size <= len(pixels) - at)
        batches.append(pixels[at : at + size])
        at += size
    each = map if _on_accelerator() else parallel
    return np.concatenate(
        list(each(lambda x: np.asarray(network.embed_pixels(x), np.float32), batches))
    )


def opened(model: "Network | str | Path | None", vector: str | None) -> "Network":
    """Returns a network that is open, or opens it."""
    from cgd_jax import network  # with JAX, which an index that is up to date does without

    return (
        network.open_network(model, vector)
        if model is None or isinstance(model, str | Path)
        else model
    )


def _on_accelerator() -> bool:
    import jax

    return jax.default_backend() != "cpu"


def _read_info(store: Store) -> IndexInfo:
    try:
        return IndexInfo(**json.loads(store.about["info"]))
    except (KeyError, TypeError, ValueError) as error:
        raise stores.StoreError(
            f"The index {store.address} does not say what it holds: it is damaged, or was made by "
            f"another version of this program. Delete it and index the pictures anew."
        ) from error


def _read_whitening(store: Store) -> Whitening | None:
    if "whitening" not in store.about:
        return None
    with np.load(io.BytesIO(base64.b64decode(store.about["whitening"]))) as arrays:
        return arrays["mean"], arrays["projection"]
