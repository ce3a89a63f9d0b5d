"""A data set that is open: its splits, what they hold, whether they can be measured."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cgd_jax.data.shapes import Shape, as_shape
from cgd_jax.runtime.errors import InputError

if TYPE_CHECKING:  # networks are opened without it
    from cgd_jax.data.truth import Truth

# With Unicode's line and paragraph separators, and halves of surrogate pairs.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Images:
    """Images [N, H, W, 3] uint8 that are read when they are asked for, indexed as an array is."""

    def __init__(self, read: Callable[[np.ndarray], Any], numbers: np.ndarray, size: int | Shape):
        self._read, self._numbers = read, numbers  # `read` makes [B, H, W, 3] of numbers [B]
        self.shape = (len(numbers), *as_shape(size), 3)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, indices) -> Any:
        chosen = self._numbers[indices]
        images = self._read(np.atleast_1d(chosen))
        return images if chosen.ndim else images[0]


class Split(NamedTuple):
    """Images of one part of a data set, aligned by position."""

    images: Any  # [N, S, S, 3] uint8, an array or what is indexed like one
    labels: np.ndarray  # [N] int64, the class numbers of the whole data set
    ids: list[str]  # of every image, unique within the split
    class_names: dict[int, str]  # class number → name
    skipped: int = 0  # files that could not be used
    contents: np.ndarray | None = None  # [N] int64, equal where the files of images are
    # Of queries: what they find in the gallery, where no class says it.
    truth: "Truth | None" = None
    cache: Path | None = None  # the folder of caches, where resized images are kept
    encoded: Images | None = None  # of examples, see `cache.encoded`; for images of other sizes


def rows_of(split: Split, chosen: np.ndarray) -> Split:
    """Returns a split with some of its rows, given as [N] bool."""
    if chosen.all():
        return split
    rows = np.flatnonzero(chosen)
    images, encoded = (
        None if part is None else Images(part.__getitem__, rows, part.shape[1])
        for part in (split.images, split.encoded)
    )
    return split._replace(
        images=images,
        encoded=encoded,
        labels=split.labels[rows],
        ids=[split.ids[i] for i in rows],
        contents=None if split.contents is None else np.asarray(split.contents)[rows],
    )


class Dataset(NamedTuple):
    """A data set for retrieval."""

    train: Split
    query: Split
    gallery: Split | None  # None: every query searches all the other queries
    validation: Split | None = None  # images to choose a step by, if the source has such a split

    def is_match(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Returns whether items [R, K] of the gallery are right for queries [R]: bools [R, K]."""
        if self.query.truth is not None:
            right = (self.query.truth.positives[q] for q in rows)
            return np.array([np.isin(k, r) for k, r in zip(items, right, strict=True)])
        searched = self.query if self.gallery is None else self.gallery
        return searched.labels[items] == self.query.labels[rows, None]

    def own_rows(self) -> np.ndarray | None:
        """Returns the gallery row [Q] that each query itself is, under any name: no match of it.

        It is -1 for queries that are not in the gallery; None if it is not known that any is.
        """
        if self.gallery is None:  # the queries search themselves
            return np.arange(len(self.query.labels))
        if self.query.contents is None or self.gallery.contents is None:
            return None
        items, first = np.unique(self.gallery.contents, return_index=True)
        place = np.searchsorted(items, self.query.contents).clip(max=len(items) - 1)
        own = np.where(items[place] == self.query.contents, first[place], -1)
        return own if (own >= 0).any() else None


def check_queries(dataset: Dataset) -> None:
    """Raises InputError if no query has anything to find; says why."""
    query, gallery = dataset.query, dataset.gallery
    counts = Counter((query if gallery is None else gallery).labels.tolist())
    if gallery is None:
        if max(counts.values(), default=0) < 2:
            raise InputError(
                f"None of the {len(counts):,} test classes has a second image, so that no "
                f"query has anything to find. Give test classes two images or more."
            )
        return
    if not counts.keys() & set(query.labels.tolist()):
        names = {**query.class_names, **gallery.class_names}
        raise InputError(
            f"No label of the queries is in the gallery, so that no query has anything to find: "
            f"queries are {listed([names.get(i, i) for i in np.unique(query.labels).tolist()])}, "
            f"the gallery is {listed([names.get(i, i) for i in counts])}. Label both alike."
        )
    own = dataset.own_rows()
    if own is None:
        return
    finds_itself = (own >= 0) & (gallery.labels[own] == query.labels)
    if all(counts[label] == own for label, own in zip(query.labels, finds_itself, strict=True)):
        raise InputError(
            "The only images in the gallery that a query could find are the queries "
            "themselves. Give the gallery other images of the same classes."
        )


def fingerprint(dataset: Dataset) -> dict:
    """Says in a few numbers what a data set holds, to recognize it later; all as JSON keeps it.

    Split → numbers of images and classes, digests of names and contents (None: not known), and for
    `train` a list "per class" of [name, images] in the order of the labels.
    """
    found = {}
    for name, split in dataset._asdict().items():
        if split is None:
            continue
        labels, counts = np.unique(split.labels, return_counts=True)
        class_of = {label: split.class_names.get(label, str(label)) for label in labels.tolist()}
        rows = zip(split.ids, split.labels.tolist(), strict=True)
        names = "".join(f"{id}\0{class_of[label]}\n" for id, label in rows)
        contents = None if split.contents is None else np.asarray(split.contents, "<i8")
        found[name] = {
            "images": len(split.labels),
            "classes": len(labels),
            "names": _digest(names.encode("utf-8", "backslashreplace")),
            "contents": None if contents is None else _digest(contents.tobytes()),
        }
        if name == "train":
            per_class = zip(class_of.values(), counts.tolist(), strict=True)
            found[name]["per class"] = [list(row) for row in per_class]
    return found


def describe_difference(old: dict, new: dict) -> list[str]:
    """Says how two data sets differ, a line for each kind of difference between fingerprints."""
    lines = []
    for name in Dataset._fields:
        before, now = old.get(name), new.get(name)
        if before is not None and now is not None:
            lines += [f"{name}: {text}" for text in _differences(before, now)]
        elif before is not now:
            lines.append(f"{name}: {'there was none' if before is None else 'there is none now'}")
    return lines


def _differences(before: dict, now: dict) -> list[str]:
    """Says how two splits differ; the coarsest kind of difference hides the finer ones."""
    then, current = dict(before.get("per class", ())), dict(now.get("per class", ()))
    kinds = {
        "that are gone": [n for n in then if n not in current],
        "that are new": [n for n in current if n not in then],
        "with another number of images": [n for n in then if current.get(n, then[n]) != then[n]],
    }
    found = [f"classes {kind} ({len(n):,}): {listed(n)}" for kind, n in kinds.items() if n]
    for key in ("classes", "images"):
        if before[key] != now[key]:
            found.append(f"{before[key]:,} {key} then, {now[key]:,} now")
    finer = {
        "names": "images have other names, other classes or another order",
        "per class": "classes are numbered otherwise",
        "contents": "there are other images under the same names",
    }
    for key, text in finer.items():
        known = None not in (before.get(key), now.get(key))
        if not found and known and before[key] != now[key]:
            found.append(text)
    return found


def listed(names: Sequence, most: int = 5) -> str:
    """Joins names for a message: `a, b, c, …`."""
    return ", ".join(printable(str(name)) for name in names[:most]) + ", …" * (len(names) > most)


def printable(name: str) -> str:
    r"""Writes line breaks and other control characters of a name as Python does: `\n`."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), name)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
