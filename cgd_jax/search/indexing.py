"""Keeps an index like the files it was made from: new ones in, vanished ones out.

A file is read again when its size or the time of its last change is another, and embedded
again when its content is. What is done is written every few seconds, so that an interrupted
run loses no more than that: the next one sees what is in the index, and goes on.
"""

import contextlib
import csv
import functools
import io
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Protocol

import numpy as np

from cgd_jax import rerank
from cgd_jax.data.decode import read_file
from cgd_jax.data.shapes import Size
from cgd_jax.network import Network
from cgd_jax.reports.names import literal
from cgd_jax.runtime import buckets, files, processes
from cgd_jax.runtime.errors import InputError
from cgd_jax.search import embedding, images, stores
from cgd_jax.search.images import LeftOut, Listed
from cgd_jax.search.stores import COLUMNS, Record

__all__ = ["Changes", "learn_whitening", "listed", "meet", "update"]

log = logging.getLogger(__name__)

# What is done is written after so many images, or so many seconds.
WRITE_EVERY = 1024
WRITE_AFTER = 15.0
SAMPLE = 5000  # images that a whitening is learned from, at most
LISTED = 20  # files that were left out, in the log; skipped.csv in the index has them all
# What tells of changes.
KNOWN = ("id", "path", "label", "size", "hash", "source", "modified", "taken")


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


class Listing(NamedTuple):
    """What sources hold."""

    images: dict[str, Listed]
    sources: set[str]
    left_out: list[LeftOut]


class Index(Protocol):
    """What an index, `index.Index`, is asked for here."""

    address: str

    @property
    def store(self) -> stores.Store: ...
    @property
    def network(self) -> Network: ...
    @property
    def whitening(self) -> tuple[np.ndarray, np.ndarray] | None: ...
    def embed_pixels(self, pixels: Sequence[np.ndarray]) -> np.ndarray: ...
    def write(self, records: Sequence[Record], vectors: np.ndarray) -> None: ...


@contextlib.contextmanager
def listed(sources: Iterable[str | Path], address: str) -> Iterator[Listing]:
    """Lists the images of folders, archives and CSVs, which can be read inside.

    Sources are those of `images.list_images` and `images.list_bucket`. Raises InputError: one is
    missing or holds no image.
    """
    scratch = Path(address).parent if stores.is_local(address) else Path.cwd()
    found = Listing({}, set(), [])
    with contextlib.ExitStack() as stack:
        # Lists come last: what they say of an image counts.
        for source in sorted(map(str, sources), key=images.is_list):
            if buckets.is_bucket(source):
                root = source.rstrip("/")
                rows, left_out = images.list_bucket(root)
            else:
                root = os.path.abspath(Path(source).expanduser())
                listing = images.list_images(Path(root), scratch, address)
                rows, left_out = stack.enter_context(listing)
            if not rows:
                raise InputError(
                    f"--images={source} holds no image, but {len(left_out):,} other files. "
                    f"Nothing was changed; to empty an index, delete it."
                )
            found.images.update((record.id, (record, file)) for record, file in rows)
            found.sources.add(root)
            found.left_out.extend(left_out)
        yield found


def update(
    index: Index,
    listing: Listing,
    prune: bool = False,
    share: tuple[int, int] = (0, 1),
    watch: Callable[[int, int], None] | None = None,
    elsewhere: Callable[..., Iterator] | None = None,
) -> Changes:
    """Brings an index up to date with what was listed, within `writing`; see `filling.update`."""
    is_first = share[0] == 0
    rows = (row for batch in index.store.read(KNOWN) for row in batch.to_pylist())
    known = {row["id"]: Record(**row) for row in rows}
    wanted = _settle(listing.images, known, listing.sources)
    missing = _missing(wanted, known, listing.sources, {path for path, _ in listing.left_out})
    changes = _update(index, wanted, known, missing, prune, share, watch, elsewhere)
    meet(share, "everything is written")
    if is_first and (share[1] > 1 or changes.added or changes.changed or changes.removed):
        index.store.finish()
    changes = changes._replace(skipped=listing.left_out * is_first + changes.skipped)
    _report(index.address, changes.skipped)
    return changes


def meet(share: tuple[int, int], where: str) -> None:
    """Waits for the other processes."""
    if share[1] > 1:
        processes.wait_for_all(where)


def learn_whitening(
    network: Network, listed: list[Listed], dimension: int, by: str
) -> tuple[np.ndarray, np.ndarray]:
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
    read = partial(_read, known={}, origins={}, size=lambda: network.size)
    outcomes = embedding.read_and_embed(
        listed[:SAMPLE], read, network.embed_pixels, "learning the whitening"
    )
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


def _update(
    index: Index,
    wanted: dict[str, Listed],
    known: dict[str, Record],
    missing: dict[str, bool],
    prune: bool,
    share: tuple[int, int],
    watch: Callable[[int, int], None] | None,
    elsewhere: Callable[..., Iterator] | None,
) -> Changes:
    """Brings this process's share of the index up to date."""
    ids = wanted.keys() | known.keys()
    mine = {id for id in ids if zlib.crc32(id.encode()) % share[1] == share[0]}
    todo = {
        id: listed
        for id, listed in wanted.items()
        if id in mine
        and (
            id not in known
            or _traits(known[id]) != _traits(listed[0])
            or known[id].taken == stores.UNKNOWN
        )
    }
    # Images that stay as they are until the end, by their content: others may take their vectors.
    origins = {known[id].hash: id for id in mine & known.keys() if id not in todo}
    skipped, copies, moved, gone, added, changed = [], [], set(), [], 0, 0
    records, vectors, written = [], [], time.monotonic()
    opening = Lock()

    def size() -> Size:
        with opening:  # by one thread, and only if there is something to embed
            return index.network.size

    if elsewhere:  # where what has moved is embedded again: too much is known to send it there
        outcomes = elsewhere(list(todo.values()), partial(_read, origins={}), known, index)
    else:
        read = partial(_read, known=known, origins=origins, size=size)
        embed = index.embed_pixels
        outcomes = embedding.read_and_embed(list(todo.values()), read, embed, "indexing")
    for done, ((record, _), found, vector) in enumerate(outcomes, 1):
        if watch:
            watch(done, len(todo))
        if isinstance(found, Exception):
            skipped.append((record.path, images.reason_of(found)))
            if record.id in known and isinstance(found, ValueError):  # else it cannot be read now
                gone.append(record.id)
            continue
        is_new = record.id not in known
        added += is_new
        if vector is not None and found["hash"] in origins:
            found, vector = Copy(origins[found["hash"]], found["taken"]), None
        if vector is None:
            copies.append((record._replace(taken=found.taken), found.origin))
            moved |= {known[found.origin].hash} if is_new else set()
            continue
        changed += not is_new
        records.append(record._replace(**found))
        vectors.append(vector)
        if len(records) >= WRITE_EVERY or time.monotonic() > written + WRITE_AFTER:
            index.write(records, np.stack(vectors))
            records, vectors, written = [], [], time.monotonic()
    if records:
        index.write(records, np.stack(vectors))
    _copy(index, copies)
    lost = {id for id in mine & missing.keys() if missing[id] and known[id].hash not in moved}
    gone += mine & missing.keys() if prune else mine & missing.keys() - lost
    if gone:
        index.store.delete(gone)
    if lost and not prune:
        log.warning(
            "%s images stay in the index whose folders are gone, empty or cannot be read, such as "
            "%s: a disk may be away. --prune removes them.",
            f"{len(lost):,}",
            literal(min(known[id].path for id in lost)),
        )
    unchanged = sum(id in wanted for id in mine) - added - changed - len(skipped)
    return Changes(added, changed, len(gone), unchanged, skipped)


def _traits(record: Record) -> tuple:
    """Returns what is the same while a file need not be looked at."""
    return record.size, record.modified, record.label, record.source


def _read(
    listed: Listed, known: dict[str, Record], origins: dict[str, str], size: Callable[[], Size]
) -> tuple[np.ndarray, dict[str, Any]] | Copy | Exception:
    """Reads a file: what `images.read` returns, what has its content, or why not."""
    record, file = listed
    try:
        data = buckets.read(str(file)) if buckets.is_bucket(file) else read_file(file)
        digest = images.hash_of(data)
        same = record.id in known and digest == known[record.id].hash
        if same or digest in origins:
            return Copy(record.id if same else origins[digest], images.taken(data))
        if images.is_drawn_here(data):
            raise ValueError("a picture that this program drew")
    except (OSError, ValueError) as error:  # it may have vanished meanwhile
        return error
    shape = size()  # an index of another network is no matter of the file
    try:
        return images.read(data, shape)
    except ValueError as error:
        return error


def _copy(index: Index, copies: list[tuple[Record, str]]) -> None:
    """Writes images whose content the index has, under their own or another id."""
    for at in range(0, len(copies), WRITE_EVERY):
        some, known = copies[at : at + WRITE_EVERY], {}
        for batch in index.store.read([*COLUMNS, "vector"], stores.among({id for _, id in some})):
            rows = batch.drop_columns(["vector"]).to_pylist()
            for row, vector in zip(rows, stores.vectors_in(batch), strict=True):
                content = {name: row[name] for name in ("hash", "width", "height", "thumbnail")}
                known[row["id"]] = content, vector
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
