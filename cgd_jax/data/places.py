"""Places: photographs that know where they were taken, queries and a database.

The folders of https://github.com/gmberton/VPR-datasets-downloader, whose names of files hold
coordinates; lists of coordinates; or one's own photographs with GPS.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from cgd_jax.data import archives, decode, truth
from cgd_jax.data.builder import ImageBuilder, ImageFile
from cgd_jax.data.dataset import printable
from cgd_jax.geography import from_utm, on_globe
from cgd_jax.runtime.errors import InputError

PARTS = {"query": "queries", "gallery": "database"}
GPS, LATITUDE, LONGITUDE, DIRECTION = 0x8825, (1, 2), (3, 4), 17  # of EXIF


class Where(NamedTuple):
    """Where a photograph was taken."""

    heading: float  # degrees; NaN: not known
    kind: str  # of its numbers: "utm", "degrees" or "frame"
    numbers: tuple  # east, north, zone (0: not known), whether south; latitude, longitude; frame


class PlaceBuilder(ImageBuilder):
    """Base of the builders of places to measure on."""

    SPLITS = ("query", "gallery")
    LOST = 0.0  # what a query counts as that has nothing near it

    def truth(self, query: Sequence[str], gallery: Sequence[str], **near: float) -> truth.Truth:
        """Returns what is right, for images with these names; `near` is of `truth.of_positions`."""
        return truth.of_positions(truth.read(self), query, gallery, lost=self.LOST, **near)

    def placed(
        self, files: list[tuple[str, str, Path]], headings: Sequence[float], positions: np.ndarray
    ) -> Iterator[ImageFile]:
        """Yields files of (split, id, path) at positions [N, C] in metres, and keeps these."""
        rows = np.column_stack([headings, positions]).tolist()
        truth.write(self, {id: row for (_, id, _), row in zip(files, rows, strict=True)})
        for (split, id, path), label, name in zip(files, *truth.cells(positions), strict=True):
            yield ImageFile(split, id, path, int(label), name)


class Places(PlaceBuilder):
    """Places in any of three forms, `queries` beside `database`.

    - Folders whose names of files are `@UTM_east@UTM_north@…` (and perhaps zone and heading);
    - queries.csv and database.csv with the columns path, latitude, longitude and perhaps heading;
      or path and frame, of a video;
    - folders of photographs with GPS coordinates in their EXIF.
    """

    HOW_TO_GET = (
        "Pass a folder with the folders queries and database, whose files are called "
        "@UTM_east@UTM_north@….jpg or have GPS coordinates in their EXIF; or with queries.csv and "
        "database.csv with the columns path,latitude,longitude; as --config.data.source=PATH."
    )

    def list_images(self, folders: list[Path]) -> Iterator[ImageFile]:
        """Lists the photographs of both parts of which is known where they were taken."""
        files, where = [], []
        for split, part in PARTS.items():
            listed = archives.find(folders, f"{part}.csv")
            found = _of_list(listed) if listed else self._of_folder(folders, split, part)
            for path, place in found:
                root = listed.parent if listed else self._root(folders, part)
                files.append(
                    (split, printable(f"{part}/{path.relative_to(root).as_posix()}"), path)
                )
                where.append(place)
        if not files:
            raise self.unusable("no photograph says where it was taken")
        yield from self.placed(files, [place.heading for place in where], _positions(where))

    def _root(self, folders: list[Path], part: str) -> Path:
        # A set may have train, val and test beside each other.
        found = (archives.find(folders, f"{of}/{part}") for of in ("test", "val"))
        return next(filter(None, found), None) or self.find(folders, part)

    def _of_folder(
        self, folders: list[Path], split: str, part: str
    ) -> Iterator[tuple[Path, Where]]:
        root = self._root(folders, part)
        for path in archives.files_below(root):
            if decode.looks_like_image(path):
                try:
                    yield path, _of_name(path.name) if "@" in path.name else _of_exif(path)
                except (ValueError, OSError) as error:
                    self.note("left_out", split, f"{part}/{path.name}", str(error))


def _of_name(name: str) -> Where:
    fields = [*name.split("@"), *[""] * 10]
    try:
        zone, heading = int(fields[3] or 0), float(fields[9] or math.nan)
        south = "" < fields[4] < "N"
        return Where(heading, "utm", (float(fields[1]), float(fields[2]), zone, south))
    except ValueError as error:
        raise ValueError("its name is not @UTM_east@UTM_north@…") from error


def _of_exif(path: Path) -> Where:
    with Image.open(io.BytesIO(decode.read_file(path)), formats=decode.FORMATS) as image:
        found = image.getexif().get_ifd(GPS)
    try:
        degrees = []
        for sign, value in (LATITUDE, LONGITUDE):
            angle = sum(float(part) / 60**i for i, part in enumerate(found[value]))
            degrees.append(-angle if found[sign] in ("S", "W") else angle)
        heading = float(found.get(DIRECTION, math.nan))
        on_globe(*degrees)
    except (LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError("no coordinates in its name or EXIF") from error
    return Where(heading, "degrees", tuple(degrees))


def _of_list(path: Path) -> Iterator[tuple[Path, Where]]:
    for where, row in archives.read_csv(path, ("path",)):
        try:
            file, heading = path.parent / row["path"], float(row.get("heading") or math.nan)
            if "frame" in row:
                yield file, Where(heading, "frame", (float(row["frame"]),))
            else:
                degrees = float(row["latitude"]), float(row["longitude"])
                on_globe(*degrees)
                yield file, Where(heading, "degrees", degrees)
        except (LookupError, ValueError) as error:
            raise InputError(
                f"{where}: latitude and longitude must be degrees, or frame a number; {error}."
            ) from error


def _positions(where: list[Where]) -> np.ndarray:
    """Returns positions [N, C] in metres: of one plane if UTM has one zone, else on the globe."""
    kinds = {place.kind for place in where}
    zones = {place.numbers[2:] for place in where if place.kind == "utm"}
    if kinds == {"frame"} or kinds == {"utm"} and len(zones) == 1:
        return np.array([place.numbers[:2] for place in where], float)
    if "frame" in kinds or any(zone == 0 for zone, _ in zones):
        raise InputError(
            "places: frames, UTM coordinates without a zone and latitudes cannot be compared. "
            "Give all photographs coordinates of one kind."
        )
    degrees = [p.numbers if p.kind == "degrees" else from_utm(*p.numbers) for p in where]
    return on_globe(*np.array(degrees, float).T)
