"""What was found, for people and for programs: a table, a picture, JSON."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from tabulate import tabulate

from cgd_jax.reports import lettering
from cgd_jax.reports.names import literal
from cgd_jax.runtime import files
from cgd_jax.search.duplicates import Group
from cgd_jax.search.index import Index
from cgd_jax.search.pictures import THUMBNAIL
from cgd_jax.search.queries import Answer, Found

__all__ = ["as_json", "as_text", "draw", "draw_groups", "groups_as_json", "groups_as_text"]

DRAWN = 20, 10  # rows, and hits of each, at most
GAP, LINE = 14, 18  # pixels: between thumbnails, of a line of a caption


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
    cell, height = THUMBNAIL + GAP, THUMBNAIL + 2 * LINE + GAP
    size = columns * cell + GAP + after_first, len(rows) * height + GAP
    sheet = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        for j, (first, second, data) in enumerate(row):
            x, y = GAP + j * cell + (after_first if j else 0), GAP + i * height
            picture = Image.open(io.BytesIO(data))
            # On the lines of text below, in the middle.
            place = x + (THUMBNAIL - picture.width) // 2, y + THUMBNAIL - picture.height
            sheet.paste(picture, place)
            for line, (text, color) in enumerate(((first, "black"), (second, "#555555")), 1):
                shown = lettering.drawable(text, 26)
                left = x + (THUMBNAIL - lettering.width(shown, 13)) / 2
                lettering.write(canvas, (left, y + THUMBNAIL + line * LINE - 3), shown, 13, color)
    files.write_picture(path, sheet)
