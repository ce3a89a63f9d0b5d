"""What is right for a query where that is not a class: kept beside a prepared data set.

A builder writes it down by the names of images, since not every listed file can be read and some
splits lose copies; `load` asks for it by the names that remain.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cgd_jax.geography import near
from cgd_jax.runtime import files

CELL = 100.0  # metres
NAME = "truth.json"


class Truth(NamedTuple):
    """What a data set knows of its test images in place of classes."""

    positives: list[np.ndarray]  # for every query positions in the gallery
    protocol: str  # the function of `protocols` that measures
    given: dict[str, Any]  # what it takes beside embeddings
    # Of queries and of the gallery, [N, C] in metres; None: not of places.
    positions: tuple[np.ndarray, np.ndarray] | None = None
    lost: float = math.nan  # what a query without positives counts as; NaN: not at all
    ignores: bool = False  # whether some of the gallery is left out for some queries


def of_lists(protocol, stored, query, gallery, right, **more) -> Truth:
    """Makes a truth of {query's name: {list's name: names}}; `right` says which are positives.

    `query` and `gallery` are the names of their images, `more` what else the protocol takes.
    """
    place = {name: i for i, name in enumerate(gallery)}
    lists = {
        kind: [np.array([place[n] for n in stored[q][kind] if n in place], int) for q in query]
        for kind in stored[query[0]]
    }
    positives = [np.concatenate(rows) for rows in zip(*(lists[k] for k in right), strict=True)]
    return Truth(positives, protocol, lists | more, ignores="junk" in lists)


def of_positions(stored, query, gallery, radius=25.0, turn=180.0, lost=0.0) -> Truth:
    """Makes a truth of {name: [heading, position…]}; radius and turn are those of `near`."""
    asked, searched = (np.array([stored[n] for n in names], float) for names in (query, gallery))
    headings = asked[:, 0], searched[:, 0]
    positives = near(asked[:, 1:], searched[:, 1:], radius, *headings, turn=turn)
    measured = {"positives": positives, "lost": lost}
    return Truth(positives, "places", measured, (asked[:, 1:], searched[:, 1:]), lost)


def cells(positions: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Numbers positions [N, C] by squares of 100 m, and names each [N].

    They stand for classes where images are counted and metrics resampled: what lies close is alike.
    """
    corner = np.floor(positions / CELL).astype(int)
    numbers = np.unique(corner, axis=0, return_inverse=True)[1].ravel()
    return numbers, [" ".join(map(str, row)) for row in corner * int(CELL)]


def write(builder, stored: dict[str, Any]) -> None:
    """Keeps what a builder knows of its test images."""
    folder = Path(builder.data_dir).parent
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / NAME, stored)


def read(builder) -> dict[str, Any]:
    """Returns what `write` was given."""
    return json.loads((Path(builder.data_dir).parent / NAME).read_text(encoding="utf-8"))
