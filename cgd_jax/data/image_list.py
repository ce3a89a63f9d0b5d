"""A CSV that says which image is what, from whatever machine it comes.

Text is UTF-8, UTF-16 or UTF-32; or cp1252, where the files on disk prove it. Paths are relative to
the CSV, with slashes or backslashes, and find files as Windows and macOS do: whether letters are
capital, and how accents are encoded, only matters where several files are alike otherwise.
"""

import json
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cgd_jax.data import archives
from cgd_jax.runtime.errors import InputError


class Row(NamedTuple):
    """One image of a list."""

    split: str  # in lower case; "" where the list names none
    id: str  # the path relative to the list, as it is on disk
    label: str
    path: Path


def read(path: Path) -> list[Row]:
    """Reads a list with the columns path, label and perhaps split.

    A path that leads nowhere stays as it was written. Raises InputError with file, line and remedy.
    """
    data = archives.read_list(path)
    encoding = json.detect_encoding(data)  # which tells UTF-8, UTF-16 and UTF-32 apart
    try:
        return _rows(path, data.decode(encoding))
    except UnicodeDecodeError as error:
        wrong = error
    for other, errors in (("cp1252", "replace"), ("utf-8", "surrogateescape")):
        rows = _rows(path, data.decode(other, errors)) if encoding == "utf-8" else []
        accented = [row for row in rows if not row.id.isascii()]
        if accented and all(os.path.exists(row.path) for row in accented):
            return rows
    line = data[: wrong.start].count(b"\n") + 1
    raise InputError(
        f"{path}, line {line}: the text is not valid {encoding.upper()} ({wrong.reason}). Save "
        "the list as UTF-8; spreadsheets call it `CSV UTF-8`."
    )


def _rows(path: Path, text: str) -> list[Row]:
    names_in, rows = lru_cache(maxsize=None)(_names_in), []
    for where, row in archives.read_csv(path, ("path", "label"), text):
        if not row["path"] or not row["label"]:
            raise InputError(f"{where}: a path or a label is missing.")
        id = _find(path.parent, row["path"], names_in)
        split, label = row.get("split", "").lower(), _composed(row["label"])
        rows.append(Row(split, id, label, path.parent / id))
    return rows


def _find(folder: Path, name: str, names_in: Callable[[Path], dict[str, list[str]]]) -> str:
    """Returns the path of the file that a name in a list means; the name if there is none."""
    if os.path.exists(folder / name):
        return name
    found = PurePosixPath()
    for part in name.replace("\\", "/").split("/"):
        if part != ".." and not os.path.exists(folder / found / part):
            alike = names_in(folder / found)[_composed(part).casefold()]
            same = [candidate for candidate in alike if _composed(candidate) == _composed(part)]
            if len(same or alike) != 1:
                return name
            (part,) = same or alike
        found = found / part
    return str(found)


def _names_in(folder: Path) -> dict[str, list[str]]:
    """Returns the names in a folder by what they are compared as."""
    names = defaultdict(list)
    for name in os.listdir(folder) if folder.is_dir() else ():
        names[_composed(name).casefold()].append(name)
    return names


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
