"""Which database an address belongs to, and one writer at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cgd_jax.runtime import locks
from cgd_jax.search import digests, stores
from cgd_jax.search.stores import Store


def open_store(address: str, about: dict[str, str] | None = None, dimension: int = 0) -> Store:
    """Opens an index; or makes one of vectors [D], if there is none and `about` describes it.

    The address is a folder or of object storage (s3://..., gs://..., az://...) for LanceDB;
    http://HOST:PORT, or a file that ends in .db, for Milvus. Raises NoIndexError, ImportError for
    the package of the database, or StoreError: it cannot be reached, or the index is damaged.
    """
    digests.check(address)
    if address.startswith(("http://", "https://", "tcp://")) or address.endswith(".db"):
        from cgd_jax.search.milvus_store import MilvusStore

        return MilvusStore(address, about, dimension)
    from cgd_jax.search.lancedb_store import LanceStore

    return LanceStore(address, about, dimension)


@contextlib.contextmanager
def writing(address: str) -> Iterator[None]:
    """Keeps other writers out of an index on this machine; elsewhere the database does.

    In the end the index has digests of its files. Raises BusyError if somebody else writes to it.
    """
    if not stores.is_local(address) or address.endswith(".db"):  # which has its own lock
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locks.one_at_a_time(Path(address, ".lock"), wait=False))
        except BlockingIOError:
            raise stores.BusyError(
                f"Another process writes to the index {address}. Wait for it, or stop it; what it "
                f"has written stays."
            ) from None
        yield
        digests.record(address)
