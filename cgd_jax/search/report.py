"""What was found, for people and for programs: a table, a picture, JSON."""

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tabulate import tabulate

from cgd_jax.reports.names import literal, shorten
from cgd_jax.search.duplicates import Group
from cgd_jax.search.index import Index
from cgd_jax.search.pictures import THUMBNAIL
from cgd_jax.search.queries import Answer, Found

__all__ = ["as_json", "as_text", "draw", "draw_groups", "groups_as_json", "groups_as_text"]

ROWS, HITS = 20, 7  # in a picture: rows at most, and hits in one
GAP, LINE = 14, 18  # pixels: between thumbnails, of a line of a caption
FONT = 7.5  # points of 1.8 pixels, of its letters

Cell = tuple[str, str, bytes]  # two lines below a picture, and the picture as JPEG


def as_text(found: Found) -> str:
    """Writes a table for every query: rank, similarity, label, path."""
    tables = []
    for answer in found.answers:
        rows = [
            (rank, f"{hit.similarity:.4f}", literal(hit.label or ""), literal(hit.path))
            for rank, hit in enumerate(answer.hits, 1)
        ]
        table = _table(["rank", "similarity", "label", "path"], rows)
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
        (
            *(number, len(group.members), f"{hit.similarity:.4f}"),
            *(literal(hit.label or ""), literal(hit.path)),
        )
        for number, group in enumerate(groups, 1)
        for hit in group.members
    ]
    return _table(["group", "pictures", "similarity", "label", "path"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Lays out rows that end with a path; names the folder that all paths are in only once."""
    try:
        folder = os.path.commonpath([os.path.dirname(row[-1]) for row in rows])
    except ValueError:  # no rows, or paths of which only some begin at the root
        folder = ""
    if folder.strip("/"):
        rows = [(*row[:-1], os.path.relpath(row[-1], folder)) for row in rows]
        above = f"in {folder}:\n"
    else:
        above = ""
    return above + tabulate(rows, header, disable_numparse=True)


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
    """Draws queries, each with the first of what was found, as a PNG.

    One query has several rows, of many each has one.
    """
    rows: list[list[Cell | None]] = []
    for answer in answers[:ROWS]:
        cells = [
            (f"{hit.similarity:.3f}", hit.label or Path(hit.path).name, index.thumbnail(hit.id))
            for hit in answer.hits[: HITS * (ROWS if len(answers) == 1 else 1)]
        ]
        query = ("query", Path(answer.query).name, answer.thumbnail)
        rows.append([query, *cells[:HITS]])
        rows += [[None, *cells[at : at + HITS]] for at in range(HITS, len(cells), HITS)]
    _draw(path, rows, behind_first=GAP)


def draw_groups(path: Path, index: Index, groups: Sequence[Group]) -> None:
    """Draws the first groups of duplicates, one a row, as a PNG."""
    rows = [
        [
            (f"{hit.similarity:.3f}", Path(hit.path).name, index.thumbnail(hit.id))
            for hit in group.members[: HITS + 1]
        ]
        for group in groups[:ROWS]
    ]
    _draw(path, rows)


def _draw(path: Path, rows: Sequence[Sequence[Cell | None]], behind_first: int = 0) -> None:
    """Draws rows of cells.

    Args:
      path: of the PNG.
      rows: each of at least one cell; None stays empty.
      behind_first: pixels between the first cell of a row and the others.
    """
    # Not at the top of the file: tables and JSON do without Matplotlib.
    from cgd_jax.reports import plots

    pictures = [[cell and Image.open(io.BytesIO(cell[2])) for cell in row] for row in rows]
    heights = [max(picture.height for picture in row if picture) for row in pictures]
    width = GAP + behind_first + max(map(len, rows)) * (THUMBNAIL + GAP)
    height = GAP + sum(heights) + len(rows) * (2 * LINE + GAP)
    sheet = Image.new("RGB", (width, height), "white")
    bottom, captions = 0, []
    for row, row_pictures, high in zip(rows, pictures, heights, strict=True):
        bottom += GAP + high
        for column, (cell, picture) in enumerate(zip(row, row_pictures, strict=True)):
            if cell is None or picture is None:
                continue
            left = GAP + column * (THUMBNAIL + GAP) + (behind_first if column else 0)
            sheet.paste(picture, (left + (THUMBNAIL - picture.width) // 2, bottom - picture.height))
            for line, (text, color) in enumerate(zip(cell[:2], ("black", "#555555"), strict=True)):
                place = left + THUMBNAIL / 2, height - (bottom + (line + 1) * LINE - 3)
                captions.append((*place, shorten(text, 26), color))
        bottom += 2 * LINE
    with plots.figure_of(path, sheet) as figure:
        for x, y, text, color in captions:
            figure.text(x, y, text, ha="center", fontsize=FONT, color=color, transform=None)
