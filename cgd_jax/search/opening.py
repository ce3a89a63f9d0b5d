"""Which database an address belongs to, and one writer at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cgd_jax.runtime import locks
from cgd_jax.search import stores
from cgd_jax.search.stores import Store

__all__ = ["open_store", "writing"]


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
        from cgd_jax.search.milvus_store import MilvusStore

        return MilvusStore(address, about, dimension)
    from cgd_jax.search.lancedb_store import LanceStore

    return LanceStore(address, about, dimension)


@contextlib.contextmanager
def writing(address: str) -> Iterator[None]:
    """Keeps other writers out of an index on this machine; elsewhere the database does.

    Raises:
      BusyError: somebody else writes to the index.
    """
    with contextlib.ExitStack() as stack:
        try:
            if stores.is_local(address) and not address.endswith(".db"):  # which has its own lock
                stack.enter_context(locks.one_at_a_time(Path(address, ".lock"), wait=False))
        except BlockingIOError:
            raise stores.BusyError(
                f"Another process writes to the index {address}. Wait for it, or stop it; what it "
                f"has written stays."
            ) from None
        yield
