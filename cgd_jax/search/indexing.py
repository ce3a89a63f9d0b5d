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
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cgd_jax import rerank
from cgd_jax.data.decode import read_file
from cgd_jax.data.shapes import Size
from cgd_jax.network import Network, open_network
from cgd_jax.reports.names import literal
from cgd_jax.runtime import files, processes
from cgd_jax.runtime.errors import InputError
from cgd_jax.search import embedding, images, stores
from cgd_jax.search.images import LeftOut, Listed
from cgd_jax.search.index import Index, Whitening
from cgd_jax.search.opening import writing
from cgd_jax.search.stores import COLUMNS, Record

__all__ = ["Changes", "update"]

log = logging.getLogger(__name__)

# What is done is written after so many images, or so many seconds.
WRITE_EVERY = 1024
WRITE_AFTER = 15.0
SAMPLE = 5000  # images that a whitening is learned from, at most
LISTED = 20  # files that were left out, in the log; skipped.csv in the index has them all
KNOWN = ("id", "label", "size", "hash", "source", "modified")  # what tells whether a file changed


class Changes(NamedTuple):
    """What became of the files."""

    added: int
    changed: int
    removed: int
    unchanged: int  # in content; perhaps with another label or time
    skipped: list[LeftOut]


def update(
    address: str,
    sources: Sequence[str | Path],
    model: Network | str | Path | None = None,
    *,
    vector: str | None = None,
    precision: str | None = None,
    whiten: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> Changes:
    """Brings an index up to date with folders, archives and CSVs; makes it if there is none.

    Args:
      address: of the index, see `opening.open_store`.
      sources: see `images.list_images`.
      model: as `Index.open` takes it.
      vector: likewise.
      precision: of the vectors of a new index, "float32" or "float16"; None is float32.
      whiten: dimension of the vectors of a new index, by PCA-whitening; None for none.
      share: (i, n): this is process i of n that fill the index together, each of which calls
        this with the same sources.

    Returns:
      What this process did.

    Raises:
      InputError: a source is missing, cannot be read or holds no image, or the index is another
        than is asked for; nothing is changed then.
      BusyError: somebody else writes to the index.
      StoreError: the index cannot be read or written; what was written stays.
    """
    is_first = share[0] == 0
    scratch = Path(address).parent if stores.is_local(address) else Path.cwd()
    wanted: dict[str, Listed] = {}
    skipped: list[LeftOut] = []
    with contextlib.ExitStack() as stack:
        if is_first:  # for all of them
            stack.enter_context(writing(address))
        for source in sources:
            absolute = Path(os.path.abspath(Path(source).expanduser()))
            listed, left_out = stack.enter_context(images.list_images(absolute, scratch))
            if not listed:
                raise InputError(
                    f"--images={source} holds no image, but {len(left_out):,} other files. "
                    f"Nothing was changed; to empty an index, delete it."
                )
            wanted |= {record.id: (record, file) for record, file in listed}
            skipped += left_out if is_first else []
        index = _existing(address, model, vector, precision, whiten)
        _meet(share, "everybody has looked whether there is an index")
        if index is None and is_first:
            network = model if isinstance(model, Network) else open_network(model, vector)
            whitening = _learn_whitening(network, list(wanted.values()), whiten) if whiten else None
            index = Index.create(
                address, network, precision=precision or "float32", whitening=whitening
            )
        _meet(share, "there is an index")
        if index is None:
            index = Index.open(address, model, vector=vector)
        changes = _update(index, wanted, share)
        _meet(share, "everything is written")
        if is_first and (share[1] > 1 or changes.added or changes.changed or changes.removed):
            index.store.finish()
    changes = changes._replace(skipped=skipped + changes.skipped)
    _report(address, changes.skipped)
    return changes


def _existing(address, model, vector, precision, whiten) -> Index | None:
    """Opens an index, if there is one; InputError if it is another than is asked for."""
    try:
        index = Index.open(address, model, vector=vector)
    except stores.NoIndexError:
        return None
    info = index.info
    whitened = info.dimension if info.whitened_from else None
    if whiten and whiten != whitened or precision not in (None, info.precision):
        raise InputError(
            f"The index {address} holds vectors in {info.precision}, "
            f"{f'whitened to {whitened} dimensions' if whitened else 'not whitened'}, which "
            f"stays as it is. Leave --precision and --whiten out, or make another index with "
            f"--index=."
        )
    return index


def _meet(share: tuple[int, int], where: str) -> None:
    """Waits for the other processes."""
    if share[1] > 1:
        processes.wait_for_all(where)


def _learn_whitening(network: Network, listed: list[Listed], dimension: int) -> Whitening:
    """Learns a PCA-whitening from some of the images; they say what matters among them."""
    if not dimension < min(network.dimension, len(listed)):
        raise InputError(
            f"--whiten={dimension}: must be below the dimension of the vectors "
            f"({network.dimension}) and the number of images ({len(listed):,})."
        )
    chosen = [listed[i] for i in np.random.default_rng(0).permutation(len(listed))[:SAMPLE]]
    read = partial(_read, known={}, size=network.size)
    outcomes = embedding.read_and_embed(
        chosen, read, network.embed_pixels, "learning the whitening"
    )
    found = [vector for _, _, vector in outcomes if vector is not None]
    if len(found) <= dimension:
        raise InputError(f"--whiten={dimension}: only {len(found):,} images can be read.")
    return rerank.learn_whitening(np.stack(found), dimension)


def _update(index: Index, wanted: dict[str, Listed], share: tuple[int, int]) -> Changes:
    """Brings this process's share of the index up to date."""
    rows = (row for batch in index.store.read(KNOWN) for row in batch.to_pylist())
    known = {row["id"]: Record(**row) for row in rows}
    mine = {id for id in wanted.keys() | known.keys() if int(id, 16) % share[1] == share[0]}
    todo = [
        (record, file)
        for id, (record, file) in wanted.items()
        if id in mine and (id not in known or _traits(known[id]) != _traits(record))
    ]
    sources = {record.source for record, _ in wanted.values()}
    gone = [id for id in mine if id not in wanted and known[id].source in sources]
    skipped, touched, added, changed = [], [], 0, 0
    records, vectors, written = [], [], time.monotonic()
    read = partial(_read, known=known, size=index.info.size)
    outcomes = embedding.read_and_embed(todo, read, index.embed_pixels, "indexing")
    for (record, _), found, vector in outcomes:
        if vector is not None:
            added += record.id not in known
            changed += record.id in known
            records.append(record._replace(**found))
            vectors.append(vector)
            if len(records) >= WRITE_EVERY or time.monotonic() > written + WRITE_AFTER:
                index.write(records, np.stack(vectors))
                records, vectors, written = [], [], time.monotonic()
        elif found is None:
            touched.append(record)
        else:
            skipped.append((record.path, found))
            gone += [record.id] if record.id in known else []
    if records:
        index.write(records, np.stack(vectors))
    _touch(index, touched)
    if gone:
        index.store.delete(gone)
    unchanged = sum(id in wanted for id in mine) - added - changed - len(skipped)
    return Changes(added, changed, len(gone), unchanged, skipped)


def _traits(record: Record) -> tuple:
    """Returns what is the same while a file need not be looked at."""
    return record.size, record.modified, record.label


def _read(
    listed: Listed, known: dict[str, Record], size: Size
) -> tuple[np.ndarray, dict[str, Any]] | str | None:
    """Reads a file: what `images.read` returns, or why not; None if the index has its content."""
    record, file = listed
    try:
        data = read_file(file)
        if record.id in known and images.hash_of(data) == known[record.id].hash:
            return None
        return images.read(data, size)
    except (OSError, ValueError) as error:  # it may have vanished meanwhile
        return images.reason_of(error)


def _touch(index: Index, touched: list[Record]) -> None:
    """Writes down the new labels and times of files whose content is the same."""
    for at in range(0, len(touched), WRITE_EVERY):
        new = {record.id: record for record in touched[at : at + WRITE_EVERY]}
        for batch in list(index.store.read([*COLUMNS, "vector"], stores.among(new))):
            old = [Record(**row) for row in batch.drop_columns(["vector"]).to_pylist()]
            records = [
                row._replace(
                    label=new[row.id].label,
                    modified=new[row.id].modified,
                    source=new[row.id].source,
                )
                for row in old
            ]
            index.write(records, stores.vectors_in(batch))


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
