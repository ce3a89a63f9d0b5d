"""Keeps an index like the files it was made from: new ones in, vanished ones out.

A file is read again when its size or the time of its last change is another, and embedded
again when its content is. What is done is written every few seconds, so that an interrupted
run loses no more than that: the next one sees what is in the index, and goes on.
"""

import csv
import functools
import io
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from cgd_jax.reports.names import literal
from cgd_jax.runtime import buckets, files
from cgd_jax.search import images, stores
from cgd_jax.search.images import LeftOut, Listed, Listing
from cgd_jax.search.stores import Record

__all__ = ["Changes", "meet", "update"]

log = logging.getLogger(__name__)

# What is done is written after so many images, or so many seconds.
WRITE_EVERY = 1024
WRITE_AFTER = 15.0
LISTED = 20  # files that were left out, in the log; skipped.csv in the index has them all
# What tells of changes.
KNOWN = ("id", "path", "label", "size", "hash", "source", "modified", "taken")
CONTENT = ("hash", "width", "height", "thumbnail")  # what files of one content share
One = TypeVar("One")


@dataclass(frozen=True)
class Copy:
    """A file whose content the index has already."""

    origin: str  # id of what has it
    taken: int


class Changes(NamedTuple):
    """What became of the files."""

    added: int
    changed: int
    removed: int
    unchanged: int  # in content; perhaps with another label or time
    skipped: list[LeftOut]

    def __str__(self) -> str:
        return (
            f"{self.added:,} images added, {self.changed:,} changed, {self.removed:,} removed, "
            f"{self.unchanged:,} unchanged, {len(self.skipped):,} files left out"
        )


class Index(Protocol):
    """What an index, `index.Index`, is asked for here."""

    address: str

    @property
    def store(self) -> stores.Store: ...
    def write(self, records: Sequence[Record], vectors: np.ndarray) -> None: ...


def update(
    index: Index,
    listing: Listing,
    prune: bool = False,
    share: tuple[int, int] = (0, 1),
    watch: Callable[[int, int], None] | None = None,
    on: str | None = None,
) -> Changes:
    """Brings an index up to date with what was listed, within `writing`; see `filling.update`."""
    is_first = share[0] == 0
    rows = (row for batch in index.store.read(KNOWN) for row in batch.to_pylist())
    known = {row["id"]: Record(**row) for row in rows}
    wanted = _share_of(_settle(listing.images, known, listing.sources), share)
    known = _share_of(known, share)
    missing = _missing(wanted, known, listing.sources, {path for path, _ in listing.left_out})
    todo = {
        id: (record._replace(hash=known[id].hash if id in known else ""), file)
        for id, (record, file) in wanted.items()
        if id not in known or _differ(known[id], record)
    }
    embedded, copies, failed = _write(index, todo, known, watch, on)
    added = sum(id not in known for id in [*embedded, *(record.id for record, _ in copies)])
    changed = sum(id in known for id in embedded)
    moved = {known[origin].hash for record, origin in copies if record.id not in known}
    lost = {id for id, away in missing.items() if away and known[id].hash not in moved}
    gone = list(missing if prune else missing.keys() - lost)
    # Others cannot be read now.
    gone += [one.id for one, error in failed if one.id in known and isinstance(error, ValueError)]
    if gone:
        index.store.delete(gone)
    if lost and not prune:
        log.warning(
            "%s images stay in the index whose folders are gone, empty or cannot be read, such as "
            "%s: a disk may be away. --prune removes them.",
            f"{len(lost):,}",
            literal(min(known[id].path for id in lost)),
        )
    meet(share, "everything is written")
    if is_first and (share[1] > 1 or added or changed or gone):
        index.store.finish()
    skipped = listing.left_out * is_first
    skipped += [(record.path, images.reason_of(error)) for record, error in failed]
    _report(index.address, skipped)
    unchanged = len(wanted) - added - changed - len(failed)
    return Changes(added, changed, len(gone), unchanged, skipped)


def meet(share: tuple[int, int], where: str) -> None:
    """Waits for the other processes."""
    if share[1] > 1:
        from cgd_jax.runtime import processes  # and JAX

        processes.wait_for_all(where)


def _share_of(images: dict[str, One], share: tuple[int, int]) -> dict[str, One]:
    """Returns those of some images by id that process i of n does."""
    i, n = share
    return {id: one for id, one in images.items() if zlib.crc32(id.encode()) % n == i}


def _settle(
    wanted: dict[str, Listed], known: dict[str, Record], given: set[str]
) -> dict[str, Listed]:
    """Says of which source an image is that is in several, whichever is indexed first or last.

    It is a list's if one names it; of folders in each other, the outermost that was ever indexed.
    """
    sources = given | {record.source for record in known.values() if record.source}
    outermost = {
        source: min((outer for outer in sources if _is_below(source, outer)), key=len)
        for source in filter(images.is_folder, given)
    }
    settled = {}
    for id, (record, file) in wanted.items():
        source = known[id].source if id in known else ""
        if images.is_list(source) and source not in given and not images.is_list(record.source):
            record = record._replace(label=known[id].label, source=source)
        elif record.source != (root := outermost.get(record.source, record.source)):
            label = stores.composed(images.label_of(Path(record.path).relative_to(root)))
            record = record._replace(label=label, source=root)
        settled[id] = record, file
    return settled


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def _missing(
    wanted: dict[str, Listed], known: dict[str, Record], given: set[str], left_out: set[str]
) -> dict[str, bool]:
    """Returns the images that sources no longer hold, and whether they may merely be away.

    That is where their folder is gone, empty or cannot be read, as when a disk is not mounted.
    """
    folders, missing = [source for source in given if images.is_folder(source)], {}

    @functools.cache
    def is_away(folder: str) -> bool:
        try:
            return not buckets.is_bucket(folder) and not os.listdir(folder)
        except OSError:
            return True

    for id, record in known.items():
        inside = images.is_folder(record.source) and any(
            _is_below(record.path, folder) for folder in folders
        )
        if id not in wanted and (inside or record.source in given):
            # What a list no longer names was taken out of it, wherever it is.
            missing[id] = (inside or record.path in left_out) and is_away(
                os.path.dirname(record.path)
            )
    return missing


def _differ(known: Record, found: Record) -> bool:
    """Returns whether a file must be looked at."""
    traits = [(one.size, one.modified, one.label, one.source) for one in (known, found)]
    return traits[0] != traits[1] or known.taken == stores.UNKNOWN


def _write(
    index: Index,
    todo: dict[str, Listed],
    known: dict[str, Record],
    watch: Callable[[int, int], None] | None,
    on: str | None,
) -> tuple[list[str], list[tuple[Record, str]], list[tuple[Record, Exception]]]:
    """Reads files, whose records have the hash that is known, and writes what is new.

    Returns the ids of what was embedded; what the index has as another image, and the id of that;
    and what cannot be read.
    """
    # Images that stay as they are until the end, by their content: others may take their vectors.
    origins = {record.hash: id for id, record in known.items() if id not in todo}
    embedded, copies, failed = [], [], []
    records, vectors, written = [], [], time.monotonic()
    outcomes = _embedded(index, list(todo.values()), origins, on) if todo else ()
    for done, ((record, _), found, vector) in enumerate(outcomes, 1):
        if watch:
            watch(done, len(todo))
        if vector is not None and found["hash"] in origins:
            found = Copy(origins[found["hash"]], found["taken"])
        if isinstance(found, Exception):
            failed.append((record, found))
        elif isinstance(found, Copy):
            copies.append((record._replace(taken=found.taken), found.origin))
        else:
            embedded.append(record.id)
            records.append(record._replace(**found))
            vectors.append(vector)
        late = time.monotonic() > written + WRITE_AFTER or done == len(todo)
        if records and (late or len(records) >= WRITE_EVERY):
            index.write(records, np.stack(vectors))
            records, vectors, written = [], [], time.monotonic()
    _copy(index, copies)
    return embedded, copies, failed


def _embedded(
    index: Index, todo: list[Listed], origins: dict[str, str], on: str | None
) -> Iterator:
    """Yields what `embedding.read_and_embed` does, on a cluster if there is one."""
    if on:  # where what has moved is embedded again: too much is known to send it there
        from cgd_jax.search import on_ray

        return on_ray.read_and_embed(todo, partial(_read, origins={}), index, on)
    from cgd_jax.search import embedding  # and JAX, which an unchanged folder does without

    return embedding.read_and_embed(todo, partial(_read, origins=origins), index, "indexing")


def _read(listed: Listed, origins: dict[str, str]) -> bytes | Copy:
    """Reads a file: its bytes, or what has its content; raises OSError, ValueError."""
    record, file = listed
    data = images.content_of(file)
    digest = images.hash_of(data)
    if digest == record.hash or digest in origins:
        origin = record.id if digest == record.hash else origins[digest]
        return Copy(origin, images.taken(data))
    return data


def _copy(index: Index, copies: list[tuple[Record, str]]) -> None:
    """Writes images whose content the index has, under their own or another id."""
    for at in range(0, len(copies), WRITE_EVERY):
        some, known = copies[at : at + WRITE_EVERY], {}
        for where in stores.among({id for _, id in some}):
            for batch in index.store.read([*CONTENT, "id", "vector"], where):
                rows = batch.drop_columns(["vector"]).to_pylist()
                for row, vector in zip(rows, stores.vectors_in(batch), strict=True):
                    known[row.pop("id")] = row, vector
        records = [record._replace(**known[id][0]) for record, id in some]
        index.write(records, np.stack([known[id][1] for _, id in some]))


def _report(address: str, skipped: list[LeftOut]) -> None:
    """Says which files were left out, and lists them in a folder's skipped.csv."""
    for path, reason in skipped[:LISTED]:
        log.warning("Left out: %s: %s.", literal(path), reason)
    if len(skipped) > LISTED:
        log.warning("... and %s more.", f"{len(skipped) - LISTED:,}")
    if Path(address).is_dir() and not address.endswith(".db"):
        text = io.StringIO(newline="")
        csv.writer(text).writerows([("path", "reason"), *skipped])
        files.write_atomically(Path(address, "skipped.csv"), text.getvalue())
