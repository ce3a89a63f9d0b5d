"""Questions from the command line: files and folders to search by."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cgd_jax.data.decode import looks_like_image, read_file
from cgd_jax.data.images import Box
from cgd_jax.reports.names import literal
from cgd_jax.runtime.errors import InputError
from cgd_jax.search import embedding, images
from cgd_jax.search.index import Index
from cgd_jax.search.stores import Hit

BLOCK = 64  # queries that are searched by at a time


class Answer(NamedTuple):
    """What was found by one query."""

    query: str  # path
    thumbnail: bytes  # JPEG of the query, or of the part that was searched by
    hits: list[Hit]


class Found(NamedTuple):
    """What was found by all queries."""

    answers: list[Answer]
    skipped: list[images.LeftOut]
    searched: int  # images
    milliseconds: float  # for all queries, without reading and embedding them


def parse_crop(text: str) -> Box:
    """Reads "x,y,width,height" as (x0, y0, x1, y1); InputError if it is something else."""
    try:
        x, y, width, height = map(float, text.split(","))
    except ValueError:
        x = y = width = height = 0.0
    if not (width > 0 and height > 0 and np.isfinite([x, y, width, height]).all()):
        raise InputError(
            f"--crop={text}: give the left and upper edge, the width and the height in pixels of "
            f"the image as it is shown, such as --crop=40,20,300,200."
        )
    return x, y, x + width, y + height


def ask(
    index: Index,
    queries: Sequence[str],
    k: int = 20,
    where: str | None = None,
    exact: bool = False,
    crop: Box | None = None,
) -> Found:
    """Searches by files, and by every image in folders, or by a part of each; see `Index.search`.

    Raises InputError where there is no such file, or none of them is an image.
    """
    paths: list[Path] = []
    skipped: list[images.LeftOut] = []
    for query in queries:
        path = Path(query).expanduser()
        if not path.exists():
            raise InputError(f"--query={query}: there is no such file or folder.")
        if path.is_dir():
            below, unreadable = images.files_of(path)
            paths += filter(looks_like_image, below)
            skipped += unreadable
        else:
            paths.append(path)
    usable, vectors = [], []
    for path, found, vector in embedding.read_and_embed(paths, read_file, index, crop=crop):
        if vector is None:
            skipped.append((str(path), images.reason_of(found)))
        else:
            usable.append((str(path), found["thumbnail"]))
            vectors.append(vector)
    if not usable:
        reasons = "; ".join(f"{literal(path)}: {reason}" for path, reason in skipped[:3])
        raise InputError(
            f"--query={','.join(queries)}: there is no image to search by. {reasons}".rstrip()
        )
    begin, hits = time.perf_counter(), []
    for at in range(0, len(vectors), BLOCK):
        hits += index.search_vectors(np.stack(vectors[at : at + BLOCK]), k, where, exact)
    elapsed = 1e3 * (time.perf_counter() - begin)
    answers = [Answer(*query, found) for query, found in zip(usable, hits, strict=True)]
    return Found(answers, skipped, index.count(where), elapsed)
