"""What an index keeps of an image, and the little that is asked of a vector database.

`Record` is the schema: each field is a column in every database. `lancedb_store` and
`milvus_store` are the databases; `opening.open_store` chooses by the address.
"""

import contextlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cgd_jax.runtime.errors import InputError, UserError

__all__ = ["Hit", "NoIndexError", "Record", "SCHEMA", "Store", "StoreError"]


class StoreError(UserError, OSError):
    """An index that cannot be opened, read or written; the message says what to do."""


class NoIndexError(UserError, FileNotFoundError):
    """There is no index at an address."""

    def __init__(self, address: str):
        super().__init__(
            f"--index={address}: there is no index. Make one first: `cgd_jax index IMAGES "
            f"--index={address}`."
        )


class BusyError(StoreError, BlockingIOError):
    """Another process writes to the index."""


COMPRESSED = ("pq", "binary")  # see `Index.create`
Whitening = tuple[np.ndarray, np.ndarray]  # mean and projection, see `rerank.learn_whitening`
UNKNOWN = -1  # when an image was taken that an earlier version of this program indexed


class Record(NamedTuple):
    """What an index keeps of an image beside its vector."""

    id: str
    path: str = ""
    label: str | None = None
    size: int = 0  # bytes
    hash: str = ""  # of the file
    width: int = 0  # pixels, as displayed
    height: int = 0
    source: str = ""  # what it was listed from
    modified: int = 0  # ns, when the file was changed last
    thumbnail: bytes = b""  # JPEG
    taken: int = UNKNOWN  # ns, by EXIF; 0 if it does not say


class Hit(NamedTuple):
    """An image that was found: its similarity, and those fields of `Record` that are shown."""

    id: str
    similarity: float  # cosine
    label: str | None
    path: str


COLUMNS = get_type_hints(Record)
LISTED = [name for name in COLUMNS if name != "thumbnail"]
HIT_COLUMNS = [name for name in Hit._fields if name in COLUMNS]
_TYPES = {str: pa.string(), str | None: pa.string(), int: pa.int64(), bytes: pa.binary()}
SCHEMA = pa.schema([(name, _TYPES[kind]) for name, kind in COLUMNS.items()])


class Store(Protocol):
    """One index in a database.

    An adapter is made with an address; `about`, texts that describe a new index; and the
    dimension D of its vectors. Without `about` it opens what is there, or raises `NoIndexError`.
    Every method raises `StoreError` where the database fails, and `InputError` for a `where` that
    it does not understand. Rows travel as Arrow tables of `SCHEMA` and "vector".
    """

    address: str
    errors: tuple[type[Exception], ...]  # that the database raises

    def about(self, name: str) -> str | None:
        """Returns a text that was written when the index was made."""

    def upsert(self, rows: pa.Table) -> None:
        """Inserts rows, or replaces those with the same ids: all of them or none."""

    def delete(self, ids: Sequence[str]) -> None:
        """Deletes rows; unknown ids are ignored."""

    def search(self, vectors: np.ndarray, k: int, where: str | None = None) -> list[list[Hit]]:
        """Finds the k nearest rows to each of [B, D] unit vectors, in any order."""

    def count(self, where: str | None = None) -> int:
        """Counts rows."""

    def read(self, names: Sequence[str], where: str | None = None) -> Iterator[pa.RecordBatch]:
        """Yields some columns of all rows, or of those that `where` selects, in pieces."""

    def approximate(self) -> bool:
        """Returns whether `search` may miss some of the nearest."""
        return False

    def version(self) -> int | None:
        """Returns a number that changes with the rows; None where the database has none."""
        return None

    def finish(self) -> None:
        """Tidies up after writing; from some size on, builds what approximate search needs."""

    def explain(self, error: Exception) -> tuple[str, bool]:
        """Returns what is wrong, and whether it is the condition if there is one."""
        return str(error), True

    @contextlib.contextmanager
    def failures(self, done: str, where: str | None = None) -> Iterator[None]:
        """Raises what the database raises as the errors that are promised."""
        try:
            yield
        except UserError:
            raise
        except self.errors as error:
            text, of_where = self.explain(error)
            text = " ".join(text.split())
            if where and of_where:
                raise InputError(f"--where={where!r} is not understood: {text}") from error
            raise StoreError(
                f"The index {self.address} could not be {done}: {text}. What was written before is "
                f"kept; mend what is named here (is there room? is the server running? does "
                f"another process use the file?) and repeat the command: it goes on from there. If "
                f"files are damaged, delete it and index the images anew."
            ) from error


def read_table(store: Store, names: Sequence[str], dimension: int = 0) -> pa.Table:
    """Reads some columns of all rows, "vector" of a dimension among them if it is named."""
    schema = schema_with_vectors(dimension)
    schema = pa.schema([schema.field(name) for name in names])
    return pa.Table.from_batches([batch.cast(schema) for batch in store.read(names)], schema)


def schema_with_vectors(dimension: int, number: pa.DataType | None = None) -> pa.Schema:
    """Returns `SCHEMA` with the column "vector", in float32 unless another type is given."""
    return SCHEMA.append(pa.field("vector", pa.list_(number or pa.float32(), dimension)))


def as_table(records: Sequence[Record], vectors: np.ndarray) -> pa.Table:
    """Returns records and their vectors [N, D] as rows."""
    numbers = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(numbers, vectors.shape[1])
    rows = pa.Table.from_pylist([record._asdict() for record in records], SCHEMA)
    return rows.append_column("vector", column)


def vectors_in(batch: pa.RecordBatch) -> np.ndarray:
    """Returns the vectors of some rows, [N, D] float32."""
    column = batch["vector"]
    numbers = column.flatten().to_numpy(zero_copy_only=False)
    return numbers.reshape(-1, column.type.list_size).astype(np.float32)


def counted(column: Sequence[pa.Array]) -> dict[str, int]:
    """Counts the values in pieces of a column, in alphabetical order."""
    counts = pc.value_counts(pa.chunked_array(column, pa.string()).drop_null())
    return dict(sorted((one["values"], one["counts"]) for one in counts.to_pylist()))


def is_local(address: str) -> bool:
    """Returns whether an index is a folder or a file here, rather than an address elsewhere."""
    return re.match(r"[a-z0-9+]{2,}://", address) is None


def composed(label: str | None) -> str | None:
    """Returns a label in the one form in which labels are kept: "ü" may be one letter or two."""
    return label and unicodedata.normalize("NFC", label)


def quoted(text: str) -> str:
    """Writes a text as SQL does."""
    return "'" + text.replace("'", "''") + "'"


def among(ids: Iterable[str]) -> Iterator[str]:
    """Yields the SQL conditions that a row has one of these ids, so many that none is too long."""
    texts = list(map(quoted, ids))
    for at in range(0, len(texts), 1000):
        yield f"id IN ({', '.join(texts[at : at + 1000])})"
