"""An index as a collection: its images in memory, in an order, and the folders that they lie in.

Folders are those below the root, the deepest one that holds all sources: what is shown of a path
does not tell where the collection lies.
"""

import functools
import os
import re
from collections.abc import Sequence
from datetime import date, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cgd_jax.search import stores
from cgd_jax.search.index import Index
from cgd_jax.search.stores import Record

IN_MEMORY = 200_000_000  # numbers (rows x dimension) of vectors that are searched there
SEPARATOR = re.escape(os.sep)
DAYS = date(1970, 1, 2), date(2261, 12, 31)  # what is counted in ns goes no farther


class Collection:
    """The images of an index as they were when it was read.

    `table` has what is known of them but thumbnails; `vectors` are theirs, [N, D] float32 of unit
    length, or None where they are compressed or too many.
    """

    def __init__(self, index: Index):
        self._index = index
        self.table = stores.read_table(index.store, stores.LISTED).combine_chunks()
        self.vectors: np.ndarray | None = None
        small = len(self.table) * index.info.dimension <= IN_MEMORY
        if small and not index.info.compress:
            ids, vectors = index.vectors()
            rows = pc.index_in(pa.array(ids, pa.string()), self.table["id"])
            known = rows.is_valid().to_numpy(zero_copy_only=False)  # not written in between
            self.table = self.table.take(rows.drop_null())
            self.vectors = vectors if known.all() else vectors[known]
        self.root = root_of(self.table)
        # A page asks for the same filters again and again.
        self.selected = functools.lru_cache(32)(self._selected)
        self._ordered = functools.lru_cache(2)(self._order)

    def _selected(self, where: str | None) -> np.ndarray:
        """Returns which images a condition selects, [N] bool."""
        if where is None:
            return np.ones(len(self.table), bool)
        found = [batch["id"].cast(pa.string()) for batch in self._index.store.read(["id"], where)]
        ids = pa.chunked_array(found, pa.string())
        return pc.is_in(self.table["id"], value_set=ids).to_numpy()

    def _order(self, order: str) -> np.ndarray:
        path, taken = self.table["path"], self.table["taken"]
        # A folder stands before those in it, and these before the next one, whatever its name.
        folder = pc.replace_substring_regex(path, f"(?s){SEPARATOR}?[^{SEPARATOR}]*$", "")
        columns = {
            "folder": pc.replace_substring(folder, os.sep, "\1"),
            "name": pc.replace_substring_regex(path, f"(?s)^.*{SEPARATOR}", ""),
            "date": pc.if_else(pc.greater(taken, 0), taken, self.table["modified"]),
        }
        keys = [("folder", "ascending"), ("name", "ascending")]
        if order == "newest":
            keys.insert(0, ("date", "descending"))
        return pc.sort_indices(pa.table(columns), keys).to_numpy()

    def listed(self, where: str | None, order: str) -> np.ndarray:
        """Returns the rows of images that a condition selects: "newest" first, or by "folder"."""
        rows = self._ordered(order)
        return rows[self.selected(where)[rows]]

    @functools.cached_property
    def rows(self) -> dict[str, int]:
        """Where the images are, by id."""
        return {id: row for row, id in enumerate(self.table["id"].to_pylist())}

    def records(self, rows: Sequence[int] | np.ndarray) -> list[Record]:
        """Returns what is known of some images but for their thumbnails."""
        return [Record(**row) for row in self.table.take(np.array(rows, int)).to_pylist()]

    def folders_below(self, rows: np.ndarray, folder: str) -> dict[str, int]:
        """Counts those of some images that lie in every folder directly below one."""
        prefix = inside(self.root, folder)
        paths = self.table["path"].take(rows)
        rest = pc.utf8_slice_codeunits(paths.filter(pc.starts_with(paths, prefix)), len(prefix))
        rest = rest.filter(pc.match_substring(rest, os.sep))
        first = pc.replace_substring_regex(rest, f"(?s){SEPARATOR}.*$", "")
        return stores.counted(first.chunks)

    @functools.cached_property
    def labels(self) -> dict[str, int]:
        """Counts the images of every label, in alphabetical order."""
        return stores.counted(self.table["label"].chunks)

    def search(
        self,
        vector: np.ndarray,
        k: int,
        where: str | None = None,
        others: Sequence[tuple[str, str]] = (),
    ) -> tuple[list[tuple[Record, float]], int, bool]:
        """Finds the images most similar to a vector [D], and their similarities.

        They are in the order of `Index.search`; `others` are columns and values of images that are
        left out. Returns also among how many it searched, and whether all of them were compared.
        """
        if self.vectors is None:
            conditions = [f"{column} <> {stores.quoted(value)}" for column, value in others]
            where = " AND ".join([*([where] if where else []), *conditions]) or None
            (hits,) = self._index.search_vectors(vector[None], k, where)
            hits = [hit for hit in hits if hit.id in self.rows]
            found = zip(self.records([self.rows[hit.id] for hit in hits]), hits, strict=True)
            store = self._index.store
            pairs = [(record, hit.similarity) for record, hit in found]
            return pairs, store.count(where), not store.approximate()
        chosen = self.selected(where)
        for column, value in others:
            chosen = chosen & pc.not_equal(self.table[column], value).to_numpy()
        rows = np.flatnonzero(chosen)
        vector = vector / max(np.linalg.norm(vector), 1e-12)
        # Dot by dot, which reads memory as fast as a product, and leaves other cores to others.
        if len(rows) < len(chosen) / 8:
            similarity = np.vecdot(self.vectors[rows], vector)
        else:
            similarity = np.vecdot(self.vectors, vector)[rows]
        similarity = similarity.astype(np.float64).round(6)  # more digits are noise
        best = np.arange(len(rows))
        if len(rows) > k:
            best = np.flatnonzero(similarity >= np.partition(similarity, -k)[-k])
        pairs = list(zip(self.records(rows[best]), similarity[best].tolist(), strict=True))
        return sorted(pairs, key=lambda one: (-one[1], one[0].id))[:k], len(rows), True


def root_of(table: pa.Table) -> str:
    """Returns the deepest folder that holds the sources of all images, with a separator behind."""
    known: list[str] = []
    for source in table["source"].unique().to_pylist():
        paths = table["path"].filter(pc.equal(table["source"], source))
        ends = [end for end in pc.min_max(paths).as_py().values() if end]
        folder = os.path.join(source, "")  # unless the source is a list, or there was none
        known += [folder] if source and all(end.startswith(folder) for end in ends) else ends
    return re.sub(f"[^{SEPARATOR}]*$", "", os.path.commonprefix(known))


def split(path: str, root: str) -> tuple[str, str]:
    """Returns the folder of an image below the root, and its name."""
    folder, _, name = path.removeprefix(root).rpartition(os.sep)
    return folder.replace(os.sep, "/"), name


def inside(root: str, folder: str) -> str:
    """Returns what the paths of all images in a folder begin with, at any depth."""
    return root + (os.path.join(folder.replace("/", os.sep), "") if folder else "")


def below(folder: str) -> str:
    """Returns the condition that a path begins with a folder's, which ends in a separator.

    Not LIKE, whose signs names may hold: all that begins with "a/" stands from "a/" to "a0".
    """
    end = folder[:-1] + chr(ord(folder[-1]) + 1)
    return f"path >= {stores.quoted(folder)} AND path < {stores.quoted(end)}"


def between(first: date | None, last: date | None) -> list[str]:
    """Returns the conditions, if any, that an image was taken on one of these days.

    Where EXIF does not say, the file was changed last on one of them.
    """
    span = [f"{{0}} >= {_nanoseconds(first)}"] if first else []
    span += [f"{{0}} < {_nanoseconds(last, 1)}"] if last else []
    ways = [
        " AND ".join([known, *span]).format(column)
        for known, column in (("taken > 0", "taken"), ("taken <= 0", "modified"))
    ]
    return [f"(({ways[0]}) OR ({ways[1]}))"] if span else []


def _nanoseconds(day: date, later: int = 0) -> int:
    day = min(max(day, DAYS[0]), DAYS[1]) + timedelta(later)
    return int(datetime.combine(day, datetime.min.time()).timestamp()) * 1_000_000_000
