"""Your own photographs: a folder per class, or a CSV that says which file is what."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np

from cgd_jax.data import archives, photo_list
from cgd_jax.data.builder import ImageBuilder, Photograph
from cgd_jax.data.dataset import listed
from cgd_jax.data.decode import looks_like_photograph
from cgd_jax.data.photo_list import Row

log = logging.getLogger(__name__)

# What people call a split, in lower case → what it is.
ROLES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    "query": "query",
    "gallery": "gallery",
}
SPLITS = (("train", "query", "gallery"), ("train", "test"), ("train", "val"))
# Folders of re-identification sets, such as bounding_box_train, are of this kind too.
NAMES_A_SPLIT = re.compile(
    r"((bounding_box|image|images|gt|multi)[_-])?(train|test|val|query|gallery|bbox)\w*", re.I
)


class ImageFolder(ImageBuilder):
    """Photographs of one's own, in any of three forms.

    - `root/class_name/*.jpg` (or any other format that Pillow reads; deeper folders count to
      the class): the classes are divided at random into train and test;
    - `root/train/class_name/*` beside `root/test/...`, or beside `root/query/...` and
      `root/gallery/...`: used as they are. Capital letters do not matter, and where there is
      no test, `val` stands for it;
    - a CSV with the columns path, label and perhaps split, see `photo_list`.

    The root may lie in folders that hold nothing else. An archive of one of the first two
    forms will do as well.

    Args:
      split_seed: of the random division of the classes.
      test_fraction: share of the classes that go to the test split, between 0 and 1.
      nested_classes: every folder that holds images is a class of its own, named by its
        whole path, instead of every folder directly below the root.
      **keywords: of `ImageBuilder`.
    """

    CONFIG_KEYS = (*ImageBuilder.CONFIG_KEYS, "split_seed", "test_fraction", "nested_classes")

    HOW_TO_GET = (
        "Pass a folder with one subfolder of photographs per class, an archive of one, or a CSV "
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
            raise ValueError(
                f"image_folder: test_fraction is the share of classes to test on, between 0 and "
                f"1, not {test_fraction}."
            )
        self._seed, self._test_fraction = int(split_seed), float(test_fraction)
        self._nested_classes = bool(nested_classes)
        super().__init__(**keywords)

    def options(self) -> str:
        """Returns seed, share and class rule, which shape the splits."""
        return f"{self._seed} {self._test_fraction} {self._nested_classes}"

    def photographs(self, folders: list[Path]) -> dict[str, list[Photograph]]:
        """Lists the photographs by split; labels number the class names in alphabetical order."""
        (folder,), source = folders, Path(self._made_of["source"])
        if folder.is_file():
            found, left_out = _from_list(folder)
        else:
            found, left_out = _from_folders(folder, self._nested_classes, source.is_file())
        for id, reason in left_out:
            self.note("left_out", "", id, reason)
        names = sorted({row.label for rows in found.values() for row in rows})
        if len(names) < 2:
            reasons = Counter(reason for _, reason in left_out).most_common(3)
            also = "".join(f"; {count:,} files are left out: {why}" for why, count in reasons)
            raise ValueError(
                f"image_folder: found {len(names)} classes with photographs in {source}"
                f"{also}. Training and testing on different classes takes at least two. "
                f"{self.HOW_TO_GET}"
            )
        number = {name: i for i, name in enumerate(names)}
        photographs = {
            split: [
                Photograph(row.id, row.path, number[row.label], row.label) for row in sorted(rows)
            ]
            for split, rows in found.items()
        }
        if "" in photographs:
            photographs = _divide(photographs[""], len(names), self._seed, self._test_fraction)
        return photographs

    def download_and_prepare(self, **keywords) -> None:
        """Builds the data set unless it is built; see `ImageBuilder`."""
        super().download_and_prepare(**keywords)
        root = Path(self._made_of["source"])
        if self.report_path("left_out").exists() or not root.is_dir():
            return
        # Built by a version that knew fewer formats of files and names of splits.
        then = sum(split.num_examples for split in self.info.splits.values())
        try:
            found, _ = _from_folders(root, self._nested_classes, False)
            now = sum(map(len, found.values()))
            change = f"of the {now} photographs that are found today it has {then}"
            if "" not in found and not {"test", "gallery"} & set(os.listdir(root)):
                change = "it takes the names of splits for classes"
            elif now == then + len(self.report("skipped")):
                return
        except ValueError as error:
            change = str(error)
        log.warning(
            "%s was built by an older version of this code and is used as it is: %s. Delete it to "
            "build it anew.",
            Path(self.data_dir).parent,
            change.rstrip("."),
        )

    def _locate(self, source: str) -> Path | archives.Download:
        path = Path(source).expanduser()
        if path.suffix.lower() == ".csv" and path.is_file():
            return path
        return super()._locate(source)

    def _fingerprint(self) -> str:
        mark, source = super()._fingerprint(), Path(self._made_of["source"])
        if source.suffix.lower() == ".csv":  # The files it names count as well.
            mark += "".join(
                archives.fingerprint(row.path) if archives.is_file(row.path) else "-"
                for row in photo_list.read(source)
            )
        return mark


def _understand(names: set[str]) -> dict[str, str] | None:
    """Returns what people call their splits → split; None if the names are not of splits."""
    called: dict[str, str] = {}
    for name in sorted(names, key=lambda name: (name != name.lower(), name)):
        if name.lower() in ROLES:
            called.setdefault(ROLES[name.lower()], name)
    for roles in SPLITS:
        if set(roles) <= called.keys():
            return {called[role]: role.replace("val", "test") for role in roles}
    return None


def _from_list(path: Path) -> tuple[dict[str, list[Row]], list[tuple[str, str]]]:
    """Reads a CSV: its rows by split ("" if it names none), and (id, reason) of those left out."""
    rows = photo_list.read(path)
    names = {row.split for row in rows}
    splits = {"": ""} if names <= {""} else _understand(names)
    unknown = sorted(name for name in names - (splits or {}).keys() if ROLES.get(name) != "val")
    if splits is None or unknown:
        raise ValueError(
            f"{path}: the column split holds {sorted(names)}, but needs train and test, or train, "
            "query and gallery, in every row (or no such column: classes are then divided)."
        )
    return _by_split(rows, splits)


def _from_folders(
    root: Path, nested: bool, from_archive: bool
) -> tuple[dict[str, list[Row]], list[tuple[str, str]]]:
    """Lists the photographs below a folder; returns as `_from_list`."""
    if from_archive or not nested:
        root = _innermost(root)
    folders = {path.name for path in _visible(root) if path.is_dir()}
    splits = _understand(folders)
    if splits is None:
        roles = {ROLES.get(name.lower()) for name in folders}
        if "train" in roles and roles & {"query", "gallery"}:
            raise ValueError(
                f"image_folder: {root} has a folder train and only one of query and gallery. All "
                "three are needed; or name the folder of test photographs test."
            )
        if folders and all(NAMES_A_SPLIT.fullmatch(name) for name in folders):
            raise ValueError(
                f"image_folder: the folders in {root} ({listed(sorted(folders))}) look like "
                "splits, not like classes. Name them train and test, or train, query and gallery, "
                "with a folder per class in each; or write a CSV with the columns path,label,split."
            )
    rows, left_out = [], []
    for path in archives.files_below(root):
        id = path.relative_to(root).as_posix()
        split, _, rest = id.partition("/") if splits else ("", "", id)
        folder, _, _ = rest.rpartition("/")
        if not looks_like_photograph(path):
            ending = path.suffix.lower()
            left_out.append(
                (id, f"no photograph by its {f'ending {ending}' if ending else 'name'}")
            )
        elif not folder:
            left_out.append((id, "in no folder of a class"))
        else:
            name = folder if nested else folder.partition("/")[0]
            rows.append(Row(split, id, unicodedata.normalize("NFC", name), path))
    found, others = _by_split(rows, splits or {"": ""})
    return found, left_out + others


def _by_split(
    rows: list[Row], splits: dict[str, str]
) -> tuple[dict[str, list[Row]], list[tuple[str, str]]]:
    found: dict[str, list[Row]] = {split: [] for split in splits.values()}
    left_out = []
    for row in rows:
        if row.split in splits:
            found[splits[row.split]].append(row)
        else:
            left_out.append((row.id, f"in {row.split}, beside {', '.join(splits)}"))
    return found, left_out


def _innermost(folder: Path) -> Path:
    """Returns the folder that has the classes, below folders that hold one folder only."""
    for _ in range(8):
        inside = _visible(folder)
        inner = [path for path in inside if path.is_dir()]
        if len(inner) != 1 or any(looks_like_photograph(path) for path in inside):
            break
        if not any(path.is_dir() for path in _visible(inner[0])):  # a class
            break
        (folder,) = inner
    return folder


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not archives.is_litter(path.name)]


def _divide(rows: list[Photograph], classes: int, seed: int, fraction: float) -> dict:
    """Divides the classes between train and test."""
    order = np.random.default_rng(seed).permutation(classes)
    test = set(order[: min(max(round(classes * fraction), 1), classes - 1)].tolist())
    return {
        "train": [row for row in rows if row.label not in test],
        "test": [row for row in rows if row.label in test],
    }
