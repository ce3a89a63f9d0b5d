"""Your own images: a folder per class, or a CSV that says which file is what."""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from cgd_jax.data import archives, image_list
from cgd_jax.data.builder import ImageBuilder, ImageFile
from cgd_jax.data.dataset import listed
from cgd_jax.data.decode import looks_like_image
from cgd_jax.data.image_list import Row
from cgd_jax.runtime.errors import InputError

# What people call a split, in lower case → what it is.
ROLES = {role: role for role in ("train", "test", "val", "query", "gallery")}
ROLES |= {"training": "train", "testing": "test", "valid": "val", "validation": "val"}
SPLITS = (("train", "query", "gallery"), ("train", "test"))
# Folders of re-identification sets, such as bounding_box_train, are of this kind too.
NAMES_A_SPLIT = re.compile(
    r"((bounding_box|image|images|gt|multi)[_-])?(train|test|val|query|gallery|bbox)\w*", re.I
)


class ImageFolder(ImageBuilder):
    """Images of one's own, in any of three forms.

    - `root/class_name/*.jpg` (or any other format that Pillow reads; deeper folders count to
      the class, or with `nested_classes` are one each, named by their whole paths): the classes are
      divided at random, by `split_seed`, and a `test_fraction` of them goes to the test split;
    - `root/train/class_name/*` beside `root/test/...`, or beside `root/query/...` and
      `root/gallery/...`: used as they are. Images in `root/val/...` choose the step; where
      there is no other split to test on, they test. Capital letters do not matter;
    - a CSV with the columns path, label and perhaps split, see `image_list`.

    The root may lie in folders that hold nothing else. An archive of one of the first two
    forms will do as well.
    """

    VERSION = tfds.core.Version("1.1.0")  # with the split val, if the source has it
    CONFIG_KEYS = (*ImageBuilder.CONFIG_KEYS, "split_seed", "test_fraction", "nested_classes")
    FILE_ENDINGS = (*ImageBuilder.FILE_ENDINGS, ".csv")
    HOW_TO_GET = (
        "Pass a folder with one subfolder of images per class, an archive of one, or a CSV "
        "with the columns path,label[,split], as --config.data.source=PATH."
    )

    def __init__(
        self,
        *,
        split_seed: int = 0,
        test_fraction: float = 0.5,
        nested_classes: bool = False,
        **keywords,
    ):
        if not 0 < test_fraction < 1:
            raise InputError(
                f"image_folder: test_fraction is the share of classes to test on, between 0 and "
                f"1, not {test_fraction}."
            )
        self._seed, self._test_fraction = int(split_seed), float(test_fraction)
        self._nested_classes = bool(nested_classes)
        options = f"{self._seed} {self._test_fraction} {self._nested_classes}"
        super().__init__(options=options, **keywords)

    def list_images(self, folders: list[Path]) -> Iterator[ImageFile]:
        """Lists the images; labels number the class names in alphabetical order."""
        (source,) = folders
        if source.is_file():
            rows = image_list.read(source)
            splits = _splits_of_list(source, {row.split for row in rows})
        else:
            if not self._nested_classes or source != self._source:  # else every folder counts
                source = _innermost(source)
            splits = _splits_of_folders(source)
            rows = list(self._rows_below(source, bool(splits)))
        splits = splits or {"": ""}
        for row in rows:
            if row.split not in splits:
                self.note("left_out", "", row.id, f"in {row.split}, beside {', '.join(splits)}")
        rows = sorted(row for row in rows if row.split in splits)
        names = sorted({row.label for row in rows})
        if len(names) < 2:
            reasons = Counter(row["reason"] for row in self._notes["left_out"]).most_common(3)
            also = "".join(f"; {count:,} files are left out: {why}" for why, count in reasons)
            raise self.unusable(
                f"found {len(names) or 'no'} class with images in {self._source}{also}. "
                "Training and testing on different classes takes at least two"
            )
        number = {name: i for i, name in enumerate(names)}
        test = _test_classes(len(names), self._seed, self._test_fraction)
        for row in rows:
            label = number[row.label]
            split = splits[row.split] or ("test" if label in test else "train")
            yield ImageFile(split, row.id, row.path, label, row.label)

    def fingerprint(self) -> str:
        """Returns what changes when the source, or a file that a CSV names, does."""
        mark = super().fingerprint()
        if self._source.suffix.lower() == ".csv":
            for row in image_list.read(self._source):
                with contextlib.suppress(OSError):  # no such file
                    mark += archives.fingerprint(row.path)
        return mark

    def _rows_below(self, root: Path, has_splits: bool) -> Iterator[Row]:
        """Yields the images below a folder, and notes the files that are left out."""
        # A file counts once, but an image of the gallery may be a query too.
        parts = _visible(root) if has_splits else [root]
        for path in (path for part in parts for path in archives.files_below(part)):
            id = path.relative_to(root).as_posix()
            split, _, rest = id.partition("/") if has_splits else ("", "", id)
            folder = rest.rpartition("/")[0]
            if not looks_like_image(path):
                name = f"ending {path.suffix.lower()}" if path.suffix else "name"
                self.note("left_out", "", id, f"no image by its {name}")
            elif not folder:
                self.note("left_out", "", id, "in no folder of a class")
            else:
                name = folder if self._nested_classes else folder.partition("/")[0]
                yield Row(split, id, unicodedata.normalize("NFC", name), path)


def _understand(names: set[str]) -> dict[str, str] | None:
    """Returns what people call their splits → split; None if the names are not of splits."""
    called: dict[str, str] = {}
    for name in sorted(names, key=lambda name: (name != name.lower(), name)):
        if name.lower() in ROLES:
            called.setdefault(ROLES[name.lower()], name)
    for roles in SPLITS:
        if set(roles) <= called.keys():
            return {called[role]: role for role in (*roles, "val") if role in called}
    if {"train", "val"} <= called.keys():
        return {called["train"]: "train", called["val"]: "test"}
    return None


def _splits_of_list(path: Path, names: set[str]) -> dict[str, str] | None:
    """Understands the names in the column split; None if there are none."""
    if names <= {""}:
        return None
    splits = _understand(names)
    if not splits or any(ROLES.get(name) != "val" for name in names - splits.keys()):
        raise InputError(
            f"{path}: the column split holds {sorted(names)}, but needs train and test, or train, "
            "query and gallery, in every row (or no such column: classes are then divided)."
        )
    return splits


def _splits_of_folders(root: Path) -> dict[str, str] | None:
    """Understands the folders of a root as splits; None if they are classes."""
    folders = {path.name for path in _visible(root) if path.is_dir()}
    if splits := _understand(folders):
        return splits
    roles = {ROLES.get(name.lower()) for name in folders}
    half = "train" in roles and roles & {"query", "gallery"}
    if half or folders and all(NAMES_A_SPLIT.fullmatch(name) for name in folders):
        raise InputError(
            f"image_folder: the folders in {root} ({listed(sorted(folders))}) look like "
            "splits, not like classes. Name them train and test, or train, query and gallery "
            "(all three), with a folder per class in each; or write a CSV with the columns "
            "path,label,split."
        )
    return None


def _innermost(folder: Path) -> Path:
    """Returns the folder that has the classes, below folders that hold one folder only."""
    inside = _visible(folder)
    inner = [path for path in inside if path.is_dir()]
    if len(inner) != 1 or any(looks_like_image(path) for path in inside):
        return folder
    is_class = not any(path.is_dir() for path in _visible(inner[0]))
    return folder if is_class else _innermost(inner[0])


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not archives.is_litter(path.name))


def _test_classes(classes: int, seed: int, fraction: float) -> set[int]:
    """Draws which of the classes 0, 1, … test."""
    order = np.random.default_rng(seed).permutation(classes)
    return set(order[: min(max(round(classes * fraction), 1), classes - 1)].tolist())
