"""GSV-Cities: places of 23 cities that Google Street View passed again over the years.

Ali-bey, Chaib-draa and Giguère, "GSV-Cities: Toward Appropriate Supervised Visual Place
Recognition", Neurocomputing 2022, https://github.com/amaralibey/gsv-cities.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cgd_jax.data import archives
from cgd_jax.data.builder import ImageBuilder, ImageFile

COLUMNS = ("place_id", "year", "month", "northdeg", "city_id", "lat", "lon", "panoid")


class GsvCities(ImageBuilder):
    """GSV-Cities, to train on: a class is a place of a city, its images are of several years.

    How many places and images there are is published only roughly, and not checked.
    """

    SPLITS = ("train",)
    HOW_TO_GET = (
        "Get GSV-Cities from https://www.kaggle.com/datasets/amaralibey/gsv-cities and pass the "
        "folder, which holds Dataframes and Images, or the archive of it, as "
        "--config.data.source=PATH."
    )

    def list_images(self, folders: list[Path]) -> Iterator[ImageFile]:
        """Lists the rows of the cities' tables."""
        tables = self.find(folders, "Dataframes")
        number: dict[tuple[str, str], int] = {}
        for table in sorted(tables.glob("*.csv")):
            for _, row in archives.read_csv(table, COLUMNS):
                city, place = row["city_id"], row["place_id"]
                label = number.setdefault((city, place), len(number))
                path = tables.parent / "Images" / city / _file_name(row)
                if not path.exists() and path.with_suffix(".JPG").exists():
                    path = path.with_suffix(".JPG")
                id = path.relative_to(tables.parent / "Images").as_posix()
                yield ImageFile("train", id, path, label, f"{city} {place}")


def _file_name(row: dict[str, str]) -> str:
    # As the authors' program makes it, which reads coordinates as numbers.
    fields = [row["city_id"], row["place_id"].zfill(7), row["year"].zfill(4)]
    fields += [row["month"].zfill(2), row["northdeg"].zfill(3)]
    fields += [str(float(row["lat"])), str(float(row["lon"])), row["panoid"]]
    return "_".join(fields) + ".jpg"
