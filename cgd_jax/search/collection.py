"""An index as a collection: its images in an order, and the folders that they lie in.

Folders are those below the root, the deepest one that holds all sources: what is shown of a path
does not tell where the collection lies.
"""

import os
import re
from datetime import date, datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc

from cgd_jax.search import stores
from cgd_jax.search.index import Index

__all__ = ["below", "between", "folders_below", "inside", "listing", "root_of", "split"]

LISTED = ["id", "path", "label", "source", "modified", "taken"]
SEPARATOR = re.escape(os.sep)
DAYS = date(1970, 1, 2), date(2261, 12, 31)  # what is counted in ns goes no farther


def listing(index: Index, where: str | None, order: str) -> pa.Table:
    """Returns the columns `LISTED` of the images that a condition selects.

    Args:
      index: whose images.
      where: as for `Index.search`.
      order: "newest" first, or by "folder" and name.
    """
    schema = pa.schema([stores.SCHEMA.field(name) for name in LISTED])
    batches = [batch.cast(schema) for batch in index.store.read(LISTED, where)]
    table = pa.Table.from_batches(batches, schema)
    # A folder stands before those in it, and these before the next one, whatever its name.
    folder = pc.replace_substring_regex(table["path"], f"(?s){SEPARATOR}?[^{SEPARATOR}]*$", "")
    columns = {
        "folder": pc.replace_substring(folder, os.sep, "\1"),
        "name": pc.replace_substring_regex(table["path"], f"(?s)^.*{SEPARATOR}", ""),
        "date": pc.if_else(pc.greater(table["taken"], 0), table["taken"], table["modified"]),
    }
    for name, values in columns.items():
        table = table.append_column(name, values)
    keys = [("folder", "ascending"), ("name", "ascending")]
    if order == "newest":
        keys.insert(0, ("date", "descending"))
    return table.take(pc.sort_indices(table, keys)).select(LISTED).combine_chunks()


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


def folders_below(table: pa.Table, prefix: str) -> dict[str, int]:
    """Counts the images of every folder that lies directly below one."""
    inside = table["path"].filter(pc.starts_with(table["path"], prefix))
    rest = pc.utf8_slice_codeunits(inside, len(prefix))
    rest = rest.filter(pc.match_substring(rest, os.sep))
    counts = pc.value_counts(pc.replace_substring_regex(rest, f"(?s){SEPARATOR}.*$", ""))
    return dict(sorted((one["values"], one["counts"]) for one in counts.to_pylist()))


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
