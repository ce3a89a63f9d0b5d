"""Keeps an index like the files it was made from: new ones in, vanished ones out.

A file is read again when its size or the time of its last change is another, and embedded
again when its content is. What is done is written every few seconds, so that an interrupted
run loses no more than that: the next one sees what is in the index, and goes on.
"""

import contextlib
import csv
import io
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cgd_jax.runtime import files
from cgd_jax.runtime.console import progress
from cgd_jax.runtime.threads import CORES, parallel
from cgd_jax.search import index as indexes
from cgd_jax.search import pictures, stores
from cgd_jax.search.index import Index
from cgd_jax.search.pictures import File, Picture
from cgd_jax.search.stores import COLUMNS

if TYPE_CHECKING:
    from cgd_jax.network import Network

__all__ = ["Changes", "update"]

log = logging.getLogger(__name__)

# What is done is written after so many pictures, or so many seconds.
WRITE_EVERY = 1024
WRITE_AFTER = 15.0
# So many pictures are read ahead, so that the next batch is there when the device is free.
READ_AHEAD = 2 * indexes.BATCHES[-1]
SAMPLE = 5000  # pictures that a whitening is learned from, at most
LISTED = 20  # files that were left out, in the log; skipped.csv in the index has them all


class Changes(NamedTuple):
    """What became of the files."""

    added: int
    changed: int
    removed: int
    unchanged: int  # in content; perhaps with another label or time
    skipped: list[tuple[str, str]]  # (path, reason)


class _Known(NamedTuple):
    """What the index says of a file."""

    size: int
    modified: int
    label: str | None
    hash: str
    source: str


def update(
    address: str,
    sources: Sequence[str | Path],
    model: "Network | str | Path | None" = None,
    *,
    vector: str | None = None,
    precision: str | None = None,
    whiten: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> Changes:
    """Brings an index up to date with folders, archives and CSVs; makes it if there is none.

    Args:
      address: of the index, see `stores.open_store`.
      sources: see `pictures.list_files`.
      model: as `Index.open` takes it.
      vector: likewise.
      precision: of the vectors of a new index, "float32" or "float16"; None is float32.
      whiten: dimension of the vectors of a new index, by PCA-whitening; None for none.
      share: (i, n): this is process i of n that fill the index together, each of which calls
        this with the same sources.

    Returns:
      What this process did.

    Raises:
      FileNotFoundError: there is no such source or network.
      ValueError: a source cannot be read or holds no picture, or the index is another than is
        asked for; nothing is changed then.
      BlockingIOError: somebody else writes to the index.
      StoreError: the index cannot be read or written; what was written stays.
    """
    is_first = share[0] == 0
    scratch = Path(address).parent if stores.is_local(address) else Path.cwd()
    wanted: dict[str, tuple[File, str]] = {}
    skipped: list[tuple[str, str]] = []
    with contextlib.ExitStack() as stack:
        if is_first:  # for all of them
            stack.enter_context(indexes.writing(address))
        for source in sources:
            absolute = Path(os.path.abspath(Path(source).expanduser()))
            listed, left_out = stack.enter_context(pictures.list_files(absolute, scratch))
            if not listed:
                raise ValueError(
                    f"--images={source} holds no photograph, but {len(left_out):,} other files. "
                    f"Nothing was changed; to empty an index, delete it."
                )
            wanted |= {file.id: (file, str(absolute)) for file in listed}
            skipped += left_out if is_first else []
        index = _existing(address, model, vector, precision, whiten)
        _meet(share, "everybody has looked whether there is an index")
        if index is None and is_first:
            network = indexes.opened(model, vector)
            everything = [file for file, _ in wanted.values()]
            whitening = _learn_whitening(network, everything, whiten) if whiten else None
            index = Index.create(
                address, network, precision=precision or "float32", whitening=whitening
            )
        _meet(share, "there is an index")
        index = index or Index.open(address, model, vector=vector)
        changes = _update(index, wanted, {source for _, source in wanted.values()}, share)
        _meet(share, "everything is written")
        if is_first and (share[1] > 1 or changes.added or changes.changed or changes.removed):
            index.store.finish()
    skipped += changes.skipped
    _report(address, skipped)
    return changes._replace(skipped=skipped)


def _existing(address, model, vector, precision, whiten) -> Index | None:
    """Opens an index, if there is one; ValueError if it is another than is asked for."""
    try:
        index = Index.open(address, model, vector=vector)
    except stores.NoIndexError:
        return None
    info = index.info
    whitened = info.dimension if info.whitened_from else None
    if whiten and whiten != whitened or precision not in (None, info.precision):
        raise ValueError(
            f"The index {address} holds vectors in {info.precision}, "
            f"{f'whitened to {whitened} dimensions' if whitened else 'not whitened'}, which "
            f"stays as it is. Leave --precision and --whiten out, or make another index with "
            f"--index=."
        )
    return index


def _meet(share: tuple[int, int], where: str) -> None:
    """Waits for the other processes."""
    if share[1] > 1:
        from cgd_jax.runtime import processes

        processes.wait_for_all(where)


def _learn_whitening(network: "Network", listed: list[File], dimension: int) -> indexes.Whitening:
    """Learns a PCA-whitening from some of the pictures; they say what matters among them."""
    from cgd_jax import rerank

    if not dimension < min(network.dimension, len(listed)):
        raise ValueError(
            f"--whiten={dimension}: must be below the dimension of the vectors "
            f"({network.dimension}) and the number of pictures ({len(listed):,})."
        )
    chosen = np.random.default_rng(0).permutation(len(listed))[:SAMPLE]
    found: list[np.ndarray] = []
    with progress(len(chosen), "learning the whitening") as bar:
        read = parallel(
            partial(_read, resize=network.resize), [listed[i] for i in chosen], READ_AHEAD // CORES
        )
        for batch in _batches(read, indexes.enough()):
            pixels = [picture.pixels for picture in batch if isinstance(picture, Picture)]
            bar.update(len(batch))
            if pixels:
                found.append(indexes.embed_pixels(network, np.stack(pixels)))
    vectors = np.concatenate(found)
    if len(vectors) <= dimension:
        raise ValueError(f"--whiten={dimension}: only {len(vectors):,} pictures can be read.")
    return rerank.learn_whitening(vectors, dimension)


def _update(
    index: Index, wanted: dict[str, tuple[File, str]], sources: set[str], share: tuple[int, int]
) -> Changes:
    """Brings this process's share of the index up to date."""
    known = _read_known(index)
    mine = {id for id in wanted.keys() | known.keys() if int(id, 16) % share[1] == share[0]}
    todo = [
        file
        for id, (file, source) in wanted.items()
        if id in mine
        and (id not in known or known[id][:3] != (file.size, file.modified, file.label))
    ]
    gone = [id for id in mine if id not in wanted and known[id].source in sources]
    skipped, added, changed, touched = [], 0, 0, []
    writer = _Writer(index, wanted)
    task = partial(_read_if_changed, known=known, resize=index.info.resize)
    if todo:
        with progress(len(todo), "indexing") as bar:
            for file, outcome in parallel(task, todo, READ_AHEAD // CORES):
                if isinstance(outcome, Picture):
                    writer.add(file, outcome)
                    added += file.id not in known
                    changed += file.id in known
                elif outcome is None:
                    touched.append(file)
                else:
                    skipped.append((file.path, outcome))
                    gone += [file.id] if file.id in known else []
                bar.update()
            writer.finish()
    _touch(index, touched, wanted)
    if gone:
        index.store.delete(gone)
    unchanged = sum(id in wanted for id in mine) - added - changed - len(skipped)
    return Changes(added, changed, len(gone), unchanged, skipped)


class _Writer:
    """Embeds pictures, a batch at a time, and writes them now and then."""

    def __init__(self, index: Index, wanted: dict[str, tuple[File, str]]):
        self._index, self._wanted = index, wanted
        self._read: list[tuple[File, Picture]] = []  # to be embedded
        self._rows: list[tuple[File, Picture]] = []  # to be written
        self._vectors: list[np.ndarray] = []
        self._written = time.monotonic()

    def add(self, file: File, picture: Picture) -> None:
        self._read.append((file, picture))
        if len(self._read) == indexes.enough():
            self._embed()
            if len(self._rows) >= WRITE_EVERY or time.monotonic() > self._written + WRITE_AFTER:
                self._write()

    def finish(self) -> None:
        self._embed()
        self._write()

    def _embed(self) -> None:
        if self._read:
            pixels = np.stack([picture.pixels for _, picture in self._read])
            self._vectors.append(self._index.embed_pixels(pixels))
            # The pixels are not needed any more, and are the largest part.
            self._rows += [(file, picture._replace(pixels=None)) for file, picture in self._read]
        self._read = []

    def _write(self) -> None:
        if self._rows:
            sources = [self._wanted[file.id][1] for file, _ in self._rows]
            self._index.write(self._rows, np.concatenate(self._vectors), sources)
        self._rows, self._vectors, self._written = [], [], time.monotonic()


def _read_known(index: Index) -> dict[str, _Known]:
    known = {}
    names = ("id", *_Known._fields)
    for columns in index.store.read(names):
        for id, *values in zip(*(columns[name] for name in names), strict=True):
            known[id] = _Known(*values)
    return known


def _read(file: File, resize: int) -> Picture | str:
    """Reads a file; returns the reason if it cannot be used."""
    try:
        return pictures.read(file.file.read_bytes(), resize)
    except ValueError as error:
        return str(error)
    except OSError as error:  # it vanished meanwhile, or must not be read
        return error.strerror or str(error)


def _read_if_changed(
    file: File, known: dict[str, _Known], resize: int
) -> tuple[File, Picture | str | None]:
    """Reads a file as `_read` does; None if its content is what the index has."""
    if file.id in known and file.size == known[file.id].size:
        with contextlib.suppress(OSError):
            if pictures.hash_of(file.file.read_bytes()) == known[file.id].hash:
                return file, None
    return file, _read(file, resize)


def _touch(index: Index, touched: list[File], wanted: dict[str, tuple[File, str]]) -> None:
    """Writes down the new labels and times of files whose content is the same."""
    for some in _batches(iter(touched), WRITE_EVERY):
        by_id = {file.id: file for file in some}
        where = f"id IN ({', '.join(map(stores.quoted, by_id))})"
        for columns in list(index.store.read([*COLUMNS, "vector"], where)):
            now = [by_id[id] for id in columns["id"]]
            columns["label"] = [file.label for file in now]
            columns["modified"] = [file.modified for file in now]
            columns["source"] = [wanted[file.id][1] for file in now]
            index.store.upsert(columns)


def _batches(items: Iterable, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _report(address: str, skipped: list[tuple[str, str]]) -> None:
    """Says which files were left out, and lists them in a folder's skipped.csv."""
    for path, reason in skipped[:LISTED]:
        log.warning("Left out: %s: %s.", path, reason)
    if len(skipped) > LISTED:
        log.warning("... and %s more.", f"{len(skipped) - LISTED:,}")
    if Path(address).is_dir() and not address.endswith(".db"):
        text = io.StringIO(newline="")
        csv.writer(text).writerows([("path", "reason"), *skipped])
        files.write_atomically(Path(address, "skipped.csv"), text.getvalue())
