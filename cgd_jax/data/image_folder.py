"""Your own photographs: a folder per class, or a CSV that says which file is what."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from pathlib import Path

import numpy as np

from cgd_jax.data import archives
from cgd_jax.data.builder import ImageBuilder, Photograph

log = logging.getLogger(__name__)

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SPLITS = ({"train", "test"}, {"train", "query", "gallery"})


class ImageFolder(ImageBuilder):
    """Photographs of one's own, in any of three forms.

    - `root/class_name/*.jpg` (or jpeg, png, webp, bmp; deeper folders count to the class):
      the classes are divided at random into train and test;
    - `root/train/class_name/*` beside `root/test/...`, or beside `root/query/...` and
      `root/gallery/...`: used as they are;
    - a CSV with the columns path, label and perhaps split, paths relative to the CSV.

    An archive of one of the first two forms will do as well.

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

    def photographs(self, folder: Path) -> dict[str, list[Photograph]]:
        """Lists the photographs by split; labels number the class names in alphabetical order."""
        if folder.is_file():
            found = _from_csv(folder)
        else:
            found = _from_folders(folder, self._nested_classes, self._source.is_file())
        names = sorted({name for rows in found.values() for _, name, _ in rows})
        if len(names) < 2:
            raise ValueError(
                f"image_folder: found {len(names)} classes with images ({', '.join(ENDINGS)}) in "
                f"{self._source}; training and testing on different classes takes at least two. "
                f"{self.HOW_TO_GET}"
            )
        label = {name: number for number, name in enumerate(names)}
        rows = {
            split: [Photograph(i, path, label[name], name) for i, name, path in sorted(members)]
            for split, members in found.items()
        }
        if "" in rows:
            rows = _divide(rows[""], len(names), self._seed, self._test_fraction)
        _warn(rows)
        return rows

    def _locate(self, source: str) -> Path | None:
        path = Path(source).expanduser()
        if path.suffix.lower() == ".csv" and path.is_file():
            return path
        return super()._locate(source)

    def _fingerprint(self) -> str:
        mark = super()._fingerprint()
        if self._source.suffix.lower() == ".csv":  # The files it names count as well.
            listed = (row for rows in _from_csv(self._source).values() for row in rows)
            mark += "".join(
                archives.fingerprint(path) if path.is_file() else "-" for _, _, path in listed
            )
        return mark


def _from_folders(root: Path, nested: bool, from_archive: bool) -> dict[str, list]:
    """Lists (id, class name, path) by split; "" where no folder names one."""
    if from_archive:  # Many archives wrap everything in one more folder.
        entries = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
        if len(entries) == 1 and entries[0].is_dir():
            root = entries[0]
    folders = {path.name for path in root.iterdir() if path.is_dir()}
    given = next((splits for splits in reversed(SPLITS) if splits <= folders), None)
    if given is None and {"query", "gallery"} & folders and "train" in folders:
        raise ValueError(
            f"image_folder: {root} has a folder train and only one of query and gallery. All "
            "three are needed; or name the folder of test photographs test."
        )
    found: dict[str, list] = {split: [] for split in given or ("",)}
    outside = 0
    for path in archives.files_below(root):
        if path.suffix.lower() not in ENDINGS:
            continue
        parts = path.relative_to(root).parts
        split, inner = (parts[0], parts[1:]) if given else ("", parts)
        if split not in found or len(inner) < 2:
            outside += 1
            continue
        name = "/".join(inner[:-1]) if nested else inner[0]
        found[split].append(("/".join(parts), name, path))
    if outside:
        log.warning(
            "image_folder: %d images in %s belong to no class folder; left out.", outside, root
        )
    return found


def _from_csv(path: Path) -> dict[str, list]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        columns = [column.strip().lower() for column in reader.fieldnames or []]
        if not {"path", "label"} <= set(columns):
            raise ValueError(
                f"{path}: the first line names the columns, which must be path,label or "
                f"path,label,split; found {','.join(columns) or 'an empty file'}."
            )
        reader.fieldnames = columns
        found: dict[str, list] = {}
        for row in reader:
            name, label = ((row[key] or "").strip() for key in ("path", "label"))
            if not name or not label:
                raise ValueError(f"{path}, line {reader.line_num}: a path or a label is missing.")
            split = (row.get("split") or "").strip().lower()
            found.setdefault(split, []).append((name, label, path.parent / name))
    if set(found) not in ({""}, *SPLITS):
        raise ValueError(
            f"{path}: the column split holds {sorted(found)}, but needs train and test, or train, "
            "query and gallery, in every row (or no such column: classes are then divided)."
        )
    return found


def _divide(rows: list[Photograph], classes: int, seed: int, fraction: float) -> dict:
    """Divides the classes between train and test."""
    order = np.random.default_rng(seed).permutation(classes)
    test = set(order[: min(max(round(classes * fraction), 1), classes - 1)].tolist())
    return {
        "train": [row for row in rows if row.label not in test],
        "test": [row for row in rows if row.label in test],
    }


def _warn(splits: dict[str, list[Photograph]]) -> None:
    """Says what is allowed but changes what the numbers mean."""
    labels = {split: Counter(row.label for row in rows) for split, rows in splits.items()}
    if "test" in splits:
        lonely = sum(count == 1 for count in labels["test"].values())
        searched = labels["test"]
    else:
        lonely = sum(label not in labels["gallery"] for label in labels["query"])
        searched = labels["query"]
    if lonely:
        log.warning(
            "image_folder: %d test classes have no second image that a query could "
            "find; it counts as a miss, or not at all, in every metric.",
            lonely,
        )
    if shared := len(labels["train"].keys() & searched.keys()):
        log.warning(
            "image_folder: %d classes are in train and in test, so the numbers are "
            "not those of unseen classes.",
            shared,
        )
