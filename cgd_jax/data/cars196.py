"""Stanford Cars: makes, models and years.

Krause, Stark, Deng and Fei-Fei, "3D Object Representations for Fine-Grained Categorization",
3dRR 2013.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import scipy.io

from cgd_jax.data import archives
from cgd_jax.data.builder import ImageBuilder, ImageFile
from cgd_jax.runtime.errors import InputError

TRAIN_CLASSES = 98  # The first half of the models trains, the second is retrieved.
COMPRESSED, MOST_UNPACKED = 15, 100_000_000  # of MATLAB's parts: the type, bytes


class Cars196(ImageBuilder):
    """CARS196 with the split of metric learning, which pools the set's own train and test.

    Every test image searches all the others. Boxes come along; the paper crops to them.
    """

    PUBLISHED = {"train": (98, 8_054), "test": (98, 8_131)}
    HOW_TO_GET = (
        "The original server is gone (404 since 2023); copies circulate in two forms, on Kaggle "
        "for example. Put into one folder either car_ims (or car_ims.tgz) and cars_annos.mat, or "
        "cars_train, cars_test and devkit (or cars_train.tgz, cars_test.tgz and car_devkit.tgz) "
        "and cars_test_annos_withlabels.mat, and pass it, or an archive of it, as "
        "--config.data.source=PATH."
    )
    BOXES = True

    INNER_ARCHIVES = {
        "car_ims": "car_ims",
        "cars_train": "cars_train",
        "cars_test": "cars_test",
        "car_devkit": "devkit",
    }

    def list_images(self, folders: list[Path]) -> Iterator[ImageFile]:
        """Lists the images of either form, from its .mat files."""
        find = partial(archives.find, folders)

        def images_in(*names: str) -> int:
            return sum(len(os.listdir(path)) for path in map(find, names) if path)

        annotations, labelled = find("cars_annos.mat"), find("cars_test_annos_withlabels.mat")
        halves = find("cars_train_annos.mat")
        if annotations and halves and labelled:  # Copies with all the lists have one form's files.
            halves = halves if images_in("cars_train", "cars_test") > images_in("car_ims") else None
            annotations = None if halves else annotations
        if annotations:
            root = (find("car_ims") or annotations.parent / "car_ims").parent
            found = [(row["relative_im_path"], row) for row in _rows(annotations)]
            rows = [(name, root / name, row["class"], _box(row)) for name, row in found]
        elif halves:
            if labelled is None:
                raise self.unusable(
                    f"there is no cars_test_annos_withlabels.mat in {folders[0]}, and without it "
                    "half of the images have no class (cars_test_annos.mat has boxes only)"
                )
            rows = [
                *_half(halves, find("cars_train"), "cars_train"),
                *_half(labelled, find("cars_test"), "cars_test"),
            ]
        else:
            missing = "there is neither cars_annos.mat nor cars_train_annos.mat"
            raise self.unusable(f"{missing} in {folders[0]}")
        names = _class_names(find("cars_annos.mat") or find("cars_meta.mat"))
        for name, path, number, box in rows:
            split = "train" if number <= TRAIN_CLASSES else "test"
            class_name = names[number - 1] if number <= len(names) else f"class {number}"
            yield ImageFile(split, name, path, number - 1, class_name, box)


def _half(annotations: Path, images: Path | None, half: str) -> list:
    folder = images or annotations.parent / half
    # Some copies hold a second folder of the same name inside.
    folder = folder / half if (folder / half).is_dir() else folder
    rows = _rows(annotations)
    return [(f"{half}/{r['fname']}", folder / r["fname"], r["class"], _box(r)) for r in rows]


def _rows(path: Path) -> list[dict]:
    try:
        table = np.atleast_1d(_load(path)["annotations"])
        rows = [{name: row[name] for name in table.dtype.names or ()} for row in table]
        for row in rows:
            row["class"] = int(row["class"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} does not hold the annotations of CARS196 (missing or wrong: {error}). Get it "
            "again from another copy."
        ) from error
    return rows


def _box(row: dict) -> tuple[float, float, float, float]:
    """Makes edges that count from 0 of inclusive corners that count from 1."""
    left, top, right, bottom = (float(row[f"bbox_{name}"]) for name in ("x1", "y1", "x2", "y2"))
    return left - 1, top - 1, right, bottom


def _class_names(path: Path | None) -> list[str]:
    if path is None:
        return []
    return [str(name) for name in np.atleast_1d(_load(path).get("class_names", []))]


def _load(path: Path) -> dict:
    data = archives.read_list(path)
    try:
        _check_unpacked(data)
        return scipy.io.loadmat(io.BytesIO(data), squeeze_me=True)
    except Exception as error:  # scipy raises nearly anything on a damaged file.
        raise InputError(f"{path} is damaged ({error}). Get it again.") from error


def _check_unpacked(data: bytes) -> None:
    """Refuses a file of MATLAB of which a part unpacks to more than annotations of cars would."""
    order, at = "<>"[data[126:128] == b"MI"], 128
    while at + 8 <= len(data):
        kind, length = struct.unpack_from(f"{order}II", data, at)
        at += 8 + length
        if kind == COMPRESSED:
            part = zlib.decompressobj().decompress(data[at - length : at], MOST_UNPACKED)
            if len(part) == MOST_UNPACKED:
                raise ValueError(f"a part of it unpacks to over {MOST_UNPACKED / 1e6:g} MB")
