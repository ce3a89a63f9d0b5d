"""Digests of the files of an index in a folder: no database notices wrong bits by itself.

LanceDB's files are never changed, only added and deleted; those of milvus-lite have digests while
no process has them open. They are listed as `sha256sum` lists them.
"""

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from cgd_jax.runtime.files import write_atomically
from cgd_jax.runtime.threads import parallel
from cgd_jax.search.stores import StoreError

LIST = "digests.txt"
HINT = "latest_version_hint.json"  # the only file that changes; LanceDB finds versions without it


def record(address: str, each: Callable = parallel) -> None:
    """Lists the files of an index; what is listed already, and may be damaged, stays as it is."""
    known, pattern = dict(_listed(address)), "*" if address.endswith(".db") else "*.lance"
    tables = Path(address).glob(pattern)
    files = (file for table in tables for file in table.rglob("*") if file.is_file())
    names = sorted(file.relative_to(address).as_posix() for file in files if file.name != HINT)
    digests = each(lambda name: known.get(name) or _digest(address, name), names)
    lines = [f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True) if digest]
    write_atomically(Path(address, LIST), "".join(lines))


def check(address: str) -> None:
    """Raises StoreError if a file is not what was written; a process reads every file once."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # no folder, or none listed
        _check(address, Path(address, LIST).stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _check(address: str, listed_at: int) -> None:
    listed = _listed(address)
    found = parallel(lambda line: _digest(address, line[0]), listed)
    for (name, digest), actual in zip(listed, found, strict=True):
        if actual not in (digest, None):
            raise StoreError(
                f"The index {address} is damaged: {name} is not what was written. Delete the index "
                f"and index the images anew."
            )


def _listed(address: str) -> list[tuple[str, str]]:
    with contextlib.suppress(FileNotFoundError):
        lines = Path(address, LIST).read_text("utf-8", "replace").splitlines()
        return [(line[66:], line[:64]) for line in lines]
    return []


def _digest(address: str, name: str) -> str | None:
    """Returns the digest of a file; None if it was tidied away with an older version."""
    path = Path(os.path.abspath(address), name)
    with contextlib.suppress(FileNotFoundError):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a stranger's list may name what never ends
            return ""
        return _read(path, status.st_mtime_ns, status.st_size)
    return None


@lru_cache(maxsize=100_000)
def _read(path: Path, modified: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
