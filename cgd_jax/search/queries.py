"""Questions from the command line: files and folders to search by."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cgd_jax.data import archives
from cgd_jax.data.decode import looks_like_image
from cgd_jax.reports.names import literal
from cgd_jax.runtime.threads import parallel
from cgd_jax.search import pictures
from cgd_jax.search.index import Index
from cgd_jax.search.stores import Hit

__all__ = ["Answer", "Found", "ask", "parse_crop"]

BLOCK = 64  # queries that are embedded and searched by at a time


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
    milliseconds: float  # for all queries, without reading and embedding them


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
    paths: list[Path] = []
    for query in queries:
        path = Path(query).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"--query={query}: there is no such file or folder.")
        inside = archives.files_below(path) if path.is_dir() else [path]
        paths += filter(looks_like_image, inside) if path.is_dir() else inside
    elapsed = 0.0
    answers: list[Answer] = []
    skipped: list[tuple[str, str]] = []
    for start in range(0, len(paths), BLOCK):
        block = paths[start : start + BLOCK]
        read = list(parallel(partial(_read, side=index.info.resize, crop=crop), block))
        skipped += [(str(p), r) for p, r in zip(block, read, strict=True) if isinstance(r, str)]
        usable = [(p, r) for p, r in zip(block, read, strict=True) if not isinstance(r, str)]
        if usable:
            vectors = index.embed_pixels(np.stack([picture.pixels for _, picture in usable]))
            begin = time.perf_counter()
            found = index.search_vectors(vectors, k, where, exact)
            elapsed += 1e3 * (time.perf_counter() - begin)
            for (path, picture), hits in zip(usable, found, strict=True):
                answers.append(Answer(str(path), picture.thumbnail, hits))
    if not answers:
        reasons = "; ".join(f"{literal(path)}: {reason}" for path, reason in skipped[:3])
        raise ValueError(
            f"--query={','.join(queries)}: there is no picture to search by. {reasons}".rstrip()
        )
    return Found(answers, skipped, index.count(where), elapsed)


def _read(path: Path, side: int, crop: pictures.Box | None) -> pictures.Picture | str:
    try:
        return pictures.read(path.read_bytes(), side, crop)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
