"""Where an index lives: the little that is asked of a vector database.

Two adapters answer: `lancedb_store` for a folder, on disk or in object storage, and `milvus_store`
for a Milvus server or a file of milvus-lite. The address says which.

Rows travel as columns: a dict of equally long sequences, "vector" an array [N, D].
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

__all__ = ["COLUMNS", "Hit", "NoIndexError", "Store", "StoreError", "open_store"]

# What is kept of a picture beside its vector: name → Python type. `source` is what it was listed
# from, `modified` the time of the file's last change in ns.
COLUMNS: dict[str, type] = {
    "id": str,
    "path": str,
    "label": str,
    "size": int,
    "hash": str,
    "width": int,
    "height": int,
    "source": str,
    "modified": int,
    "thumbnail": bytes,
}

Columns = dict[str, Any]


class StoreError(OSError):
    """An index that cannot be opened, read or written; the message says what to do."""


class NoIndexError(FileNotFoundError):
    """There is no index at an address."""


class Hit(NamedTuple):
    """A picture that was found."""

    id: str
    similarity: float  # cosine
    label: str | None
    path: str


class Store(Protocol):
    """One index in a database.

    Every method raises `StoreError` where the database fails, and ValueError for a `where` that
    it does not understand.

    Attributes:
      about: texts by name, written when the index is made and never changed.
      address: where it is.
      exact: whether `search` can be exact although there is an approximate index.
    """

    about: dict[str, str]
    address: str
    exact: bool

    def upsert(self, columns: Columns) -> None:
        """Inserts rows, or replaces those with the same ids: all of them or none."""

    def delete(self, ids: Sequence[str]) -> None:
        """Deletes rows; ids that there are not count for nothing."""

    def search(
        self, vectors: np.ndarray, k: int, where: str | None = None, exact: bool = False
    ) -> list[list[Hit]]:
        """Finds the k nearest rows to each of [B, D] unit vectors, nearest first."""

    def count(self, where: str | None = None) -> int:
        """Counts rows."""

    def read(self, names: Sequence[str], where: str | None = None) -> Iterator[Columns]:
        """Yields some columns of all rows, or of those that `where` selects, in pieces."""

    def approximate(self) -> bool:
        """Returns whether a search that is not told to be exact may be approximate."""

    def version(self) -> int | None:
        """Returns a number that changes with the rows; None where the database has none."""

    def finish(self) -> None:
        """Tidies up after writing; from some size on, builds what approximate search needs."""

    def close(self) -> None:
        """Lets go of files and connections."""


def open_store(address: str, about: dict[str, str] | None = None, dimension: int = 0) -> Store:
    """Opens an index, or makes one.

    Args:
      address: a folder or an address of object storage (s3://..., gs://..., az://...) for
        LanceDB; http://HOST:PORT, or the name of a file that ends in .db, for Milvus.
      about: of the index to make, if there is none; None to make none.
      dimension: D of the index to make.

    Raises:
      NoIndexError: there is no index, and none is to be made.
      ImportError: the package of the database is missing.
      StoreError: the database cannot be reached, or the index is damaged.
    """
    if address.startswith(("http://", "https://", "tcp://")) or address.endswith(".db"):
        from cgd_jax.search.milvus_store import MilvusStore as Adapter
    else:
        from cgd_jax.search.lancedb_store import LanceStore as Adapter  # type: ignore[assignment]
    return Adapter.open(address, about, dimension)


def is_local(address: str) -> bool:
    """Returns whether an index is a folder or a file here, rather than an address elsewhere."""
    return re.match(r"[a-z0-9+]{2,}://", address) is None


def quoted(text: str) -> str:
    """Writes a text as SQL does."""
    return "'" + text.replace("'", "''") + "'"


def no_index(address: str) -> NoIndexError:
    """Returns the error for an index that is not there."""
    return NoIndexError(
        f"--index={address}: there is no index. Make one first: --mode=index "
        f"--images=PHOTOS --index={address}."
    )
