"""What was found, for people and for programs: a table, a figure, JSON."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tabulate import tabulate

from cgd_jax.data.decode import decode
from cgd_jax.reports.names import literal, shorten
from cgd_jax.search.duplicates import Group
from cgd_jax.search.images import THUMBNAIL
from cgd_jax.search.index import Index
from cgd_jax.search.queries import Answer, Found
from cgd_jax.search.stores import Hit, StoreError

ROWS, HITS = 20, 7  # in a picture: rows at most, and hits in one
GAP, LINE = 14, 18  # pixels: between thumbnails, of a line of a caption
CAPTION: dict[str, Any] = {"ha": "center", "fontsize": 7.5, "transform": None}

Cell = tuple[str, str, bytes]  # two lines below an image, and the image as JPEG


def as_text(found: Found) -> str:
    """Writes a table for every query: rank, similarity, label, path."""
    tables = [
        f"{literal(answer.query)}\n"
        + (
            _table(["rank"], [[rank] for rank in range(1, len(answer.hits) + 1)], answer.hits)
            if answer.hits
            else "No image of the index fits what was asked for."
        )
        for answer in found.answers
    ]
    tables += [f"Left out: {literal(path)}: {reason}." for path, reason in found.skipped]
    count = len(found.answers)
    tables.append(
        f"Searched {found.searched:,} images by {count} {'query' if count == 1 else 'queries'} "
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


def groups_as_text(groups: Sequence[Group], similarity: float) -> str:
    """Writes a table of groups of duplicates; `similarity` is what was asked for."""
    if not groups:
        return f"No two images have a similarity of {similarity:g} or more."
    first = [[i, len(group.members)] for i, group in enumerate(groups, 1) for _ in group.members]
    return _table(["group", "images"], first, [hit for group in groups for hit in group.members])


def groups_as_json(groups: Sequence[Group]) -> str:
    """Writes the same for programs."""
    values = [
        {"similarity": group.similarity, "images": [hit._asdict() for hit in group.members]}
        for group in groups
    ]
    return json.dumps({"groups": values}, indent=2)


def _table(header: list[str], first: Sequence[list], hits: Sequence[Hit]) -> str:
    """Lays out hits behind other columns; names the folder that all are in only once."""
    try:
        folder = os.path.commonpath([os.path.dirname(hit.path) for hit in hits])
    except ValueError:  # no rows, or paths of which only some begin at the root
        folder = ""
    shared = bool(folder.strip("/"))
    rows = [
        [
            *cells,
            f"{hit.similarity:.4f}",
            literal(hit.label or ""),
            literal(os.path.relpath(hit.path, folder) if shared else hit.path),
        ]
        for cells, hit in zip(first, hits, strict=True)
    ]
    table = tabulate(rows, [*header, "similarity", "label", "path"], disable_numparse=True)
    return f"in {literal(folder)}:\n{table}" if shared else table


def draw(path: Path, index: Index, answers: Sequence[Answer]) -> None:
    """Draws queries, each with the first of what was found, as a PNG.

    One query has several rows, of many each has one.
    """
    rows: list[list[Cell | None]] = []
    for answer in answers[:ROWS]:
        hits = answer.hits[: HITS * (ROWS if len(answers) == 1 else 1)]
        cells = [_cell(index, hit, hit.label) for hit in hits]
        query = ("query", Path(answer.query).name, answer.thumbnail)
        rows.append([query, *cells[:HITS]])
        rows += [[None, *cells[at : at + HITS]] for at in range(HITS, len(cells), HITS)]
    _draw(path, rows)


def draw_groups(path: Path, index: Index, groups: Sequence[Group]) -> None:
    """Draws the first groups of duplicates, one a row, as a PNG."""
    rows = [[_cell(index, hit) for hit in one.members[: HITS + 1]] for one in groups[:ROWS]]
    _draw(path, rows)


def _cell(index: Index, hit: Hit, name: str | None = None) -> Cell:
    return f"{hit.similarity:.3f}", name or Path(hit.path).name, index.thumbnail(hit.id)


def _opened(thumbnail: bytes) -> Image.Image:
    """Opens a thumbnail; that of a stranger's index may be anything."""
    try:
        image = Image.fromarray(decode(thumbnail))
    except ValueError as error:
        raise StoreError(f"The index has a thumbnail that cannot be shown: {error}.") from error
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def _draw(path: Path, rows: Sequence[Sequence[Cell | None]]) -> None:
    """Draws rows of cells, as a PNG; None stays empty."""
    # Not at the top of the file: tables and JSON do without Matplotlib.
    from cgd_jax.reports import plots

    columns = max(map(len, rows))
    cells = [cell for row in rows for cell in (*row, *[None] * (columns - len(row)))]
    images = [_opened(cell[2]) if cell else Image.new("RGB", (1, 1), "white") for cell in cells]
    height = max(image.height for image in images)
    size, tiles = (THUMBNAIL, height + 2 * LINE), []
    for image in images:
        tiles.append(Image.new("RGB", size, "white"))
        tiles[-1].paste(image, ((THUMBNAIL - image.width) // 2, height - image.height))
    sheet = plots.contact_sheet(tiles, columns, GAP)
    with plots.figure_of(path, sheet) as figure:
        for i, cell in enumerate(cells):
            x = GAP + i % columns * (THUMBNAIL + GAP) + THUMBNAIL // 2
            top = sheet.height - GAP - i // columns * (size[1] + GAP) - height
            for line, text in enumerate(cell[:2] if cell else ()):
                y, color = top - (line + 1) * LINE + 3, "#555555" if line else "black"
                figure.text(x, y, shorten(text, 26), color=color, **CAPTION)
