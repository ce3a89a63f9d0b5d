"""What the builders of images share: from a list of files to a prepared data set.

A builder lists the images of each split (`ImageBuilder.list_images`); the base class reads,
checks, counts and writes them. TFDS would hold a whole split in memory to shuffle it (and needs
TensorFlow above a gigabyte), so the shards are written directly, in the order of the data set's
own lists; batches are shuffled when training draws them.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import logging
import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from cgd_jax.data import archives, decode
from cgd_jax.data.dataset import listed
from cgd_jax.runtime import buckets
from cgd_jax.runtime.console import progress
from cgd_jax.runtime.errors import InputError
from cgd_jax.runtime.files import replacing
from cgd_jax.runtime.locks import one_at_a_time
from cgd_jax.runtime.threads import parallel

log = logging.getLogger(__name__)

# What a build notes about single files → what is said of it.
REPORTS = {
    "skipped": "files are missing or unreadable",
    "left_out": "files are left out",
    "boxes": "boxes are empty, and stand for the whole image",
    "blank": "images are blank (files of 16 bits are read as 0 to 65,535: scale those that hold "
    "0 to 4,095 or 0 to 255)",
}

# TFDS holds one shard in memory while it is written.
SHARD_IMAGES, SHARD_BYTES = 1024, 128 << 20


class ImageFile(NamedTuple):
    """One image of a split, before it is read."""

    split: str  # train and test, or train, query and gallery; perhaps val
    id: str  # its path within the source
    path: Path
    label: int  # class number, unique over all splits
    class_name: str
    bbox: decode.Box | None = None  # x0, y0, x1, y1 in pixels


def example_features(boxes: bool = False) -> tfds.features.FeaturesDict:
    """Returns what every example has: the bytes of a file, and what it shows."""
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": np.int64,
        "class_name": tfds.features.Text(),
        "id": tfds.features.Text(),
    }
    if boxes:  # x0, y0, x1, y1 in pixels
        features["bbox"] = tfds.features.Tensor(shape=(4,), dtype=np.float32)
    return tfds.features.FeaturesDict(features)


class BuiltOnce(tfds.core.DatasetBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Base of the builders here: of several processes at once, one builds."""

    def download_and_prepare(self, **keywords) -> None:
        """Builds the data set unless it is on disk; see `tfds.core.DatasetBuilder`."""
        folder = Path(self.data_dir).parent
        if not os.path.exists(self.data_dir):  # A prepared data set may be read-only.
            with one_at_a_time(folder / "lock") as alone:
                if alone and not os.path.exists(self.data_dir):
                    for remains in folder.glob("incomplete.*"):  # of a process that was killed
                        shutil.rmtree(remains, ignore_errors=True)
                super().download_and_prepare(**keywords)
        if not self.info.splits:  # Another process built it since this object was made.
            self.info.read_from_directory(self.data_dir)


class ImageBuilder(BuiltOnce, tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Base of the builders that read images from a source: a folder, or an archive of one.

    The folder of a prepared data set is keyed by its source and by the options that shape the
    content, so that another source, or one that changed, is never taken for it.
    """

    # Arguments of the constructor that the `data` part of a config has under the same names.
    CONFIG_KEYS: ClassVar[tuple[str, ...]] = ("source", "allow_incomplete", "max_bad_fraction")

    VERSION = tfds.core.Version("1.0.0")
    SPLITS: ClassVar[tuple[str, ...]] = ()  # of a set that only trains, or only is searched
    # Split → classes, images; None: not known, or not of classes.
    PUBLISHED: ClassVar[dict[str, tuple[int | None, int | None]]] = {}
    HOW_TO_GET: ClassVar[str] = ""  # ends the errors about a source
    # Archives that the source may hold, without their endings → what they unpack to.
    INNER_ARCHIVES: ClassVar[dict[str, str]] = {}
    FILE_ENDINGS: ClassVar[tuple[str, ...]] = archives.ARCHIVE_ENDINGS  # sources besides folders
    BOXES: ClassVar[bool] = False

    def __init__(
        self,
        *,
        source: str = "",
        allow_incomplete: bool = False,
        max_bad_fraction: float = 0.01,
        options: str = "",
        data_dir: str | os.PathLike | None = None,
        **keywords,
    ):
        if not 0 <= max_bad_fraction <= 1:
            raise InputError(f"max_bad_fraction is a share from 0 to 1, not {max_bad_fraction}.")
        self._allow_incomplete = allow_incomplete
        self._max_bad_fraction = max_bad_fraction
        self._source = self._locate(str(source))
        key = self._key(Path(data_dir or tfds.core.constants.DATA_DIR).expanduser(), options)
        keywords.setdefault("file_format", "array_record")
        super().__init__(data_dir=data_dir, config=tfds.core.BuilderConfig(name=key), **keywords)

    def list_images(self, folders: list[Path]) -> Iterable[ImageFile]:
        """Lists all images; `folders` are the source, and what archives in it unpack to."""
        raise NotImplementedError

    def find(self, folders: list[Path], name: str) -> Path:
        """Finds a file or folder as `archives.find` does; raises InputError if there is none."""
        if path := archives.find(folders, name):
            return path
        raise self.unusable(f"there is no {name} in {folders[0]}")

    def unusable(self, problem: str) -> InputError:
        """Returns the error about a source, which ends in how to get another one."""
        return InputError(f"{self.name}: {problem}. {self.HOW_TO_GET}")

    def report_path(self, name: str) -> Path:
        """Returns the path of a report of the build, one of `REPORTS`: a CSV."""
        return Path(self.data_dir).parent / f"{name}.csv"

    def report(self, name: str) -> list[dict[str, str]]:
        """Reads a report of a prepared data set: rows with the keys split, id, reason."""
        path = self.report_path(name)
        if not path.exists():
            return []
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def note(self, report: str, split: str, id: str, reason: str) -> None:
        """Adds a row to a report of the build, one of `REPORTS`."""
        self._notes[report].append({"split": split, "id": id, "reason": reason})

    def download_and_prepare(self, **keywords) -> None:
        """Builds the data set unless it is built; of a failed build nothing looks complete."""
        super().download_and_prepare(**keywords)
        # It may have been built earlier, under more generous options.
        self._check_written(self.report("skipped"))
        for name, text in REPORTS.items():
            if rows := self.report(name):
                path = self.report_path(name)
                log.warning("%s: %d %s: %s. See %s", self.name, len(rows), text, _kinds(rows), path)

    def _locate(self, source: str) -> Path:
        path = Path(source).expanduser()
        if buckets.is_bucket(source) and not source.endswith(".csv"):
            return epath.Path(source)
        if not source:
            problem = "--config.data.source says where the images are, and is not set"
        elif not path.exists():
            problem = f"{path} does not exist"
        elif path.is_dir() or path.is_file() and path.name.lower().endswith(self.FILE_ENDINGS):
            return path
        else:
            problem = f"{path} is neither a folder nor one of {', '.join(self.FILE_ENDINGS)}"
        raise self.unusable(problem)

    def fingerprint(self) -> str:
        """Returns what changes when the source does."""
        address = str(self._source)
        if buckets.is_bucket(address):
            return buckets.fingerprint(address)
        return archives.fingerprint(self._source)

    def _key(self, root: Path, options: str) -> str:
        source = self._source.resolve()
        if root.resolve().is_relative_to(source):
            raise InputError(
                f"{self.name}: data sets are built in {root.resolve()}, which lies in {source}, "
                "where the images are; they would be another source after every build. Let "
                "--config.data.dir=FOLDER name a folder outside of it."
            )
        stem = re.sub(r"[^A-Za-z0-9]+", "_", source.name).strip("_")[:40] or "source"
        mark = f"{self.fingerprint()} {options}"
        return f"{stem}-{hashlib.sha256(mark.encode()).hexdigest()[:12]}"

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self, description=type(self).__doc__, features=example_features(self.BOXES)
        )

    def _create_builder_config(self, config, *args, **keywords):
        return config  # as TFDS does, but without its warning about unlisted configs

    def _download_and_prepare(self, dl_manager, download_config=None) -> None:
        self._notes: dict[str, list[dict[str, str]]] = {name: [] for name in REPORTS}
        with self._unpacked() as folders:
            files = defaultdict(list)
            for file in self.list_images(folders):
                files[file.split].append(file)
            searched = ("query", "gallery") if {"query", "gallery"} & files.keys() else ("test",)
            splits = self.SPLITS or ("train", *searched)
            self._files = {split: files.pop(split, []) for split in splits}
            self._files |= {"val": files.pop("val")} if "val" in files else {}
            if files:
                raise ValueError(f"{self.name} lists images of unknown splits: {list(files)}.")
            self._check_listed()
            try:
                total = sum(map(len, self._files.values()))
                with progress(total, f"building {self.name}") as self._bar:
                    super()._download_and_prepare(None, download_config)
            finally:
                for name, rows in self._notes.items():
                    _write_report(self.report_path(name), rows)
        self._check_written(self._notes["skipped"])

    @contextlib.contextmanager
    def _unpacked(self) -> Iterator[list[Path]]:
        """Yields the folder of the source, and those of archives in it that are not unpacked."""
        scratch = Path(self.data_dir).parent
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(buckets.fetched(str(self._source), scratch))
            folders = [stack.enter_context(archives.unpacked(source, scratch))]
            for stem, folder in self.INNER_ARCHIVES.items():
                names = [stem + ending for ending in archives.ARCHIVE_ENDINGS]
                found = filter(None, (archives.find(folders, name) for name in names))
                if not archives.find(folders, folder) and (archive := next(found, None)):
                    folders.append(stack.enter_context(archives.unpacked(archive, scratch)))
            yield folders

    def _check_listed(self) -> None:
        """Checks the lists of images, before anything big is read."""
        self._check_counts("images", {split: len(files) for split, files in self._files.items()})
        classes = {split: {file.label for file in files} for split, files in self._files.items()}
        self._check_counts("classes", {split: len(labels) for split, labels in classes.items()})
        for split, files in self._files.items():
            if not files:
                raise self.unusable(f"split {split} has no images")
            twice = [id for id, count in Counter(file.id for file in files).items() if count > 1]
            if twice:
                raise InputError(
                    f"{self.name}: split {split} lists {len(twice)} images more than once, "
                    f"the first {twice[0]!r}; each would find itself as its nearest neighbour. "
                    "Remove the repetitions."
                )

    def _check_written(self, skipped: list[dict[str, str]]) -> None:
        """Checks what is in the shards, and the share of files that are not."""
        counts = {name: split.num_examples for name, split in self.info.splits.items()}
        total = sum(counts.values()) + len(skipped)
        if len(skipped) > self._max_bad_fraction * total:
            raise InputError(
                f"{self.name}: {len(skipped):,} of {total:,} files are missing or unreadable, "
                f"more than the share of {self._max_bad_fraction:g} that "
                f"--config.data.max_bad_fraction allows: {_kinds(skipped)}. They are listed with "
                f"reasons in {self.report_path('skipped')}."
            )
        for name, count in counts.items():
            if not count:
                reasons = _kinds([row for row in skipped if row["split"] == name])
                raise InputError(
                    f"{self.name}: none of the images of split {name} can be read: {reasons}."
                )
        self._check_counts("images", counts)

    def _check_counts(self, kind: str, found: Mapping[str, int]) -> None:
        """Compares the images or classes of each split with the published ones."""
        for split, (classes, images) in ({} if self._allow_incomplete else self.PUBLISHED).items():
            expected = {"images": images, "classes": classes}[kind]
            if expected is not None and found.get(split, 0) != expected:
                path = self.report_path("skipped")
                skipped = f" Files that could not be used are listed in {path}."
                raise InputError(
                    f"{self.name}, split {split}: expected {expected:,} {kind}, found "
                    f"{found.get(split, 0):,}, so results would not compare with published ones. "
                    "The archive is probably not whole, or of another version."
                    f"{skipped if path.exists() else ''} To use what there is, pass "
                    "--config.data.allow_incomplete=True."
                )

    def _shard_iterators_per_split(self, dl_manager):
        return {
            split: [partial(self._examples, shard) for shard in _shards(files)]
            for split, files in self._files.items()
        }

    def _examples(self, files: list[ImageFile]) -> Iterator:
        for file, (data, found) in zip(files, parallel(_read, files), strict=True):
            self._bar.update()
            if isinstance(found, str):
                self.note("skipped", file.split, file.id, found)
                continue
            height, width, blank = found
            if blank:
                self.note("blank", file.split, file.id, "nearly black or of one colour")
            example = {
                "image": data,
                "label": file.label,
                "class_name": _text(file.class_name),
                "id": _text(file.id),
            }
            if self.BOXES:
                try:
                    box = decode.clip(file.bbox, height, width)
                except ValueError as error:
                    box = 0, 0, width, height
                    self.note("boxes", file.split, file.id, str(error))
                example["bbox"] = np.asarray(box, np.float32)
            yield file.id, example


def _read(file: ImageFile) -> tuple[bytes, tuple[int, int, bool] | str]:
    """Returns the bytes of a file, and what `decode.check` says of it or why it is unusable."""
    try:
        data = decode.read_file(file.path)
        return data, decode.check(data)
    except FileNotFoundError:
        return b"", "a link to nowhere" if file.path.is_symlink() else "no such file"
    except OSError as error:
        return b"", f"cannot be read: {error.strerror}"
    except ValueError as error:
        return b"", str(error)


def _text(name: str) -> str:
    """Makes valid Unicode of a file name; old file systems hold others."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _shards(files: list[ImageFile]) -> Iterator[list[ImageFile]]:
    shard, size = [], 0
    for file in files:
        shard.append(file)
        with contextlib.suppress(OSError):
            size += file.path.stat().st_size
        if len(shard) == SHARD_IMAGES or size >= SHARD_BYTES:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _kinds(rows: list[dict[str, str]], most: int = 3) -> str:
    """Sums up a report: the most frequent reasons, how many files have them, and examples."""
    ids = defaultdict(list)
    for row in rows:
        ids[row["reason"]].append(row["id"])
    kinds = sorted(ids, key=lambda reason: -len(ids[reason]))
    text = "; ".join(f"{len(ids[k]):,} × {k} ({listed(ids[k], 2)})" for k in kinds[:most])
    return text + "; …" * (len(kinds) > most)


def _write_report(path: Path, rows: list[dict[str, str]]) -> None:
    with (
        replacing(path) as part,
        open(part, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.DictWriter(file, ("split", "id", "reason"))
        writer.writeheader()
        writer.writerows(rows)


class DrawnBuilder(BuiltOnce, tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Base of the builders that draw their images."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        # Written in the order in which they are drawn: class by class.
        options = {"features": example_features(), "disable_shuffling": True}
        return tfds.core.DatasetInfo(builder=self, description=type(self).__doc__, **options)
