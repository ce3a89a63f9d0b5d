"""Questions from the command line: files and folders to search by, and how answers are shown."""

import io
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tabulate import tabulate

from cgd_jax.data import archives
from cgd_jax.data.decode import looks_like_photograph
from cgd_jax.reports import lettering
from cgd_jax.reports.names import literal
from cgd_jax.runtime import files
from cgd_jax.runtime.threads import parallel
from cgd_jax.search import pictures
from cgd_jax.search.duplicates import Group
from cgd_jax.search.index import Index
from cgd_jax.search.stores import Hit

__all__ = ["Answer", "Found", "as_json", "as_text", "ask", "draw", "groups_as_json", "parse_crop"]

BLOCK = 64  # queries that are embedded and searched by at a time
DRAWN = 20, 10  # rows and hits of each in a picture, at most
SIDE, GAP, LINE = pictures.THUMBNAIL, 14, 18  # pixels: of a thumbnail, between, of a caption


class Answer(NamedTuple):
    """What was found by one query."""

    query: str  # path
    thumbnail: bytes  # JPEG of the query, or of the part that was searched by
    hits: list[Hit]


class Found(NamedTuple):
    """What was found by all queries."""

    answers: list[Answer]
    skipped: list[tuple[str, str]]  # (path, reason)
    searched: int  # pictures
    milliseconds: float  # for all queries, with reading and embedding


def parse_crop(text: str) -> pictures.Box:
    """Reads "x,y,width,height" as (x0, y0, x1, y1).

    Raises:
      ValueError: it is something else.
    """
    try:
        x, y, width, height = map(float, text.split(","))
    except ValueError:
        x = y = width = height = 0.0
    if not (width > 0 and height > 0 and np.isfinite([x, y, width, height]).all()):
        raise ValueError(
            f"--crop={text}: give the left and upper edge, the width and the height in pixels of "
            f"the picture as it is shown, such as --crop=40,20,300,200."
        )
    return x, y, x + width, y + height


def ask(
    index: Index,
    queries: Sequence[str],
    k: int = 20,
    where: str | None = None,
    exact: bool = False,
    crop: pictures.Box | None = None,
) -> Found:
    """Searches by files, and by every picture in folders.

    Args:
      index: to search.
      queries: files and folders.
      k: hits of each, at most.
      where: as for `Index.search`.
      exact: likewise.
      crop: part of each query to search by.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: none of them is a picture, or `where` is not understood.
      StoreError: the index cannot be read.
    """
    begin = time.perf_counter()
    paths: list[Path] = []
    for query in queries:
        path = Path(query).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"--query={query}: there is no such file or folder.")
        inside = archives.files_below(path) if path.is_dir() else [path]
        paths += filter(looks_like_photograph, inside) if path.is_dir() else inside
    answers: list[Answer] = []
    skipped: list[tuple[str, str]] = []
    for start in range(0, len(paths), BLOCK):
        block = paths[start : start + BLOCK]
        read = list(parallel(partial(_read, side=index.info.resize, crop=crop), block))
        skipped += [(str(p), r) for p, r in zip(block, read, strict=True) if isinstance(r, str)]
        usable = [(p, r) for p, r in zip(block, read, strict=True) if not isinstance(r, str)]
        if usable:
            vectors = index.embed_pixels(np.stack([picture.pixels for _, picture in usable]))
            found = index.search_vectors(vectors, k, where, exact)
            for (path, picture), hits in zip(usable, found, strict=True):
                answers.append(Answer(str(path), picture.thumbnail, hits))
    if not answers:
        reasons = "; ".join(f"{literal(path)}: {reason}" for path, reason in skipped[:3])
        raise ValueError(
            f"--query={','.join(queries)}: there is no picture to search by. {reasons}".rstrip()
        )
    elapsed = 1e3 * (time.perf_counter() - begin)
    return Found(answers, skipped, index.count(where), elapsed)


def _read(path: Path, side: int, crop: pictures.Box | None) -> pictures.Picture | str:
    try:
        return pictures.read(path.read_bytes(), side, crop)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)


def as_text(found: Found) -> str:
    """Writes a table for every query: rank, similarity, label, path."""
    tables = []
    for answer in found.answers:
        rows = [
            (rank, f"{hit.similarity:.4f}", literal(hit.label or ""), literal(hit.path))
            for rank, hit in enumerate(answer.hits, 1)
        ]
        table = tabulate(rows, ["rank", "similarity", "label", "path"], disable_numparse=True)
        tables.append(f"{literal(answer.query)}\n{table}")
    tables += [f"Left out: {literal(path)}: {reason}." for path, reason in found.skipped]
    count = len(found.answers)
    tables.append(
        f"Searched {found.searched:,} pictures by {count} {'query' if count == 1 else 'queries'} "
        f"in {found.milliseconds:.0f} ms."
    )
    return "\n\n".join(tables)


def as_json(found: Found) -> str:
    """Writes the same for programs."""
    answers = [
        {
            "query": answer.query,
            "hits": [{"rank": i, **hit._asdict()} for i, hit in enumerate(answer.hits, 1)],
        }
        for answer in found.answers
    ]
    skipped = [{"path": path, "reason": reason} for path, reason in found.skipped]
    values = {"searched": found.searched, "milliseconds": round(found.milliseconds, 1)}
    return json.dumps({"answers": answers, "skipped": skipped, **values}, indent=2)


def groups_as_text(groups: list[Group]) -> str:
    """Writes a table of groups of duplicates."""
    rows = [
        (number, len(group.members), f"{hit.similarity:.4f}", literal(hit.label or ""), hit.path)
        for number, group in enumerate(groups, 1)
        for hit in group.members
    ]
    rows = [(*row[:-1], literal(row[-1])) for row in rows]
    header = ["group", "pictures", "similarity", "label", "path"]
    return tabulate(rows, header, disable_numparse=True)


def groups_as_json(groups: list[Group]) -> str:
    """Writes the same for programs."""
    values = [
        {
            "similarity": group.similarity,
            "pictures": [member._asdict() for member in group.members],
        }
        for group in groups
    ]
    return json.dumps({"groups": values}, indent=2)


def draw(path: Path, index: Index, answers: Sequence[Answer]) -> None:
    """Draws queries, each with the first of what was found, as a PNG."""
    rows = [
        [("query", answer.query, answer.thumbnail)]
        + [
            (f"{hit.similarity:.3f}", hit.label or Path(hit.path).name, index.thumbnail(hit.id))
            for hit in answer.hits[: DRAWN[1]]
        ]
        for answer in answers[: DRAWN[0]]
    ]
    rows = [[(f, Path(s).name if f == "query" else s, t) for f, s, t in row] for row in rows]
    _draw(path, rows, after_first=GAP)


def draw_groups(path: Path, index: Index, groups: Sequence[Group]) -> None:
    """Draws groups of duplicates, one a row, as a PNG."""
    rows = [
        [
            (f"{hit.similarity:.3f}", Path(hit.path).name, index.thumbnail(hit.id))
            for hit in group.members[: DRAWN[1]]
        ]
        for group in groups[: DRAWN[0]]
    ]
    _draw(path, rows)


def _draw(path: Path, rows: list[list[tuple[str, str, bytes]]], after_first: int = 0) -> None:
    """Draws rows of (line, line, JPEG), with space behind the first of each."""
    columns = max(map(len, rows))
    cell, height = SIDE + GAP, SIDE + 2 * LINE + GAP
    size = columns * cell + GAP + after_first, len(rows) * height + GAP
    sheet = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        for j, (first, second, data) in enumerate(row):
            x, y = GAP + j * cell + (after_first if j else 0), GAP + i * height
            picture = Image.open(io.BytesIO(data))
            # On the lines of text below, in the middle.
            place = x + (SIDE - picture.width) // 2, y + SIDE - picture.height
            sheet.paste(picture, place)
            for line, (text, color) in enumerate(((first, "black"), (second, "#555555")), 1):
                shown = lettering.drawable(text, 26)
                left = x + (SIDE - lettering.width(shown, 13)) / 2
                lettering.write(canvas, (left, y + SIDE + line * LINE - 3), shown, 13, color)
    files.write_picture(path, sheet)
