"""Mapillary Street-level Sequences: streets of thirty cities over years, days and nights.

Warburg, Hauberg, López-Antequera, Gargallo, Kuang and Civera, CVPR 2020,
https://github.com/mapillary/mapillary_sls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cgd_jax.data import archives
from cgd_jax.data.builder import ImageFile
from cgd_jax.data.places import PARTS, PlaceBuilder

CITIES = ("cph", "sf")  # which validate; of the cities that test nobody knows the positions
APART = 1e7  # metres: no image is near one of another city


class Msls(PlaceBuilder):
    """The validation cities of Mapillary's sequences as its own program measures them.

    Image to image, subtask all, no panoramas; a query with nothing near it does not count, which
    leaves 740 of 747 within 25 m. Both cities are searched together.
    """

    PUBLISHED = {"query": (None, 747), "gallery": (None, 18_871)}
    HOW_TO_GET = (
        "Get images and metadata from https://www.mapillary.com/dataset/places, unpack all "
        "archives into one folder, and pass the folder, which holds train_val/cph and "
        "train_val/sf, as --config.data.source=PATH."
    )
    LOST = math.nan

    def list_images(self, folders: list[Path]) -> Iterator[ImageFile]:
        """Lists the rows of the tables of both cities that belong to the subtask."""
        files, headings, positions = [], [], []
        for number, city in enumerate(CITIES):
            for split, part in PARTS.items():
                root = self.find(folders, f"train_val/{city}") / part.replace("queries", "query")
                tables = [
                    archives.read_csv(self.find([root], name), columns)
                    for name, columns in (
                        ("raw.csv", ("key", "ca", "pano")),
                        ("postprocessed.csv", ("key", "easting", "northing")),
                        ("subtask_index.csv", ("all",)),
                    )
                ]
                for (_, raw), (_, row), (_, task) in zip(*tables, strict=True):
                    if raw["pano"] == "False" and task["all"] == "True":
                        path = root / "images" / f"{row['key']}.jpg"
                        files.append((split, path.relative_to(root.parents[1]).as_posix(), path))
                        headings.append(float(raw["ca"] or math.nan))
                        east, north = float(row["easting"]), float(row["northing"])
                        positions.append((east, north, number * APART))
        yield from self.placed(files, headings, np.array(positions))
