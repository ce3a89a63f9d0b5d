"""What the builders of photographs share: from a list of files to a prepared data set.

A builder lists the photographs of each split (`ImageBuilder.photographs`); the base class
reads, checks, counts and writes them. TFDS would hold a whole split in memory to shuffle it
(and needs TensorFlow above a gigabyte), so the shards are written directly, in the order of
the data set's own lists; batches are shuffled when training draws them.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from cgd_jax.data import archives, decode
from cgd_jax.runtime.console import progress
from cgd_jax.runtime.files import replacing, write_atomically
from cgd_jax.runtime.locks import one_at_a_time
from cgd_jax.runtime.threads import parallel

log = logging.getLogger(__name__)

# TFDS holds one shard in memory while it is written.
SHARD_IMAGES, SHARD_BYTES = 1024, 128 << 20


class Photograph(NamedTuple):
    """One photograph of a split, before it is read."""

    id: str  # its path within the source
    path: Path
    label: int  # class number, unique over all splits
    class_name: str
    bbox: tuple[float, float, float, float] | None = None  # x0, y0, x1, y1 in pixels


class ImageBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Base of the builders that read photographs from a source: a folder, or an archive of one.

    Examples have `image` (the encoded bytes of the file), `label` (int64), `class_name`, `id`
    and, with `BOXES`, `bbox` (float32 [4]: x0, y0, x1, y1 in pixels).

    The folder of a prepared data set is keyed by its source and options, so that another
    source, or one that changed, is never taken for it. The source may be deleted afterwards.

    Args:
      source: path of the archive or folder; "auto" downloads where a server is known.
      allow_incomplete: whether counts may differ from the published ones.
      max_bad_fraction: share of files, 0 to 1, that may be missing or unreadable.
      data_dir: where prepared data sets live.
      **keywords: of `tfds.core.DatasetBuilder`.

    Raises:
      FileNotFoundError: no such source, or none given; says what to get and where.
    """

    # Arguments of the constructor that the `data` part of a config has under the same names.
    CONFIG_KEYS: ClassVar[tuple[str, ...]] = ("source", "allow_incomplete", "max_bad_fraction")

    VERSION = tfds.core.Version("1.0.0")
    PUBLISHED: ClassVar[dict[str, tuple[int, int]]] = {}  # split → classes, images
    HOW_TO_GET: ClassVar[str] = ""  # ends the errors about a source
    DOWNLOAD: ClassVar[archives.Download | None] = None
    BOXES: ClassVar[bool] = False

    def __init__(
        self,
        *,
        source: str = "",
        allow_incomplete: bool = False,
        max_bad_fraction: float = 0.01,
        data_dir: str | os.PathLike | None = None,
        **keywords,
    ):
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is a share from 0 to 1, not {max_bad_fraction}.")
        self._allow_incomplete = allow_incomplete
        self._max_bad_fraction = max_bad_fraction
        self._made_of = {
            "source": os.path.abspath(os.path.expanduser(source)),
            "options": self.options(),
        }
        key = None if os.path.exists(self._made_of["source"]) else self._built_earlier(data_dir)
        if key is None:
            self._source = self._locate(str(source))
            key = self._key()
        keywords.setdefault("file_format", "array_record")
        super().__init__(data_dir=data_dir, config=tfds.core.BuilderConfig(name=key), **keywords)

    unpacked = staticmethod(archives.unpacked)  # archive → folder, while the data set is built

    def photographs(self, folder: Path) -> dict[str, list[Photograph]]:
        """Lists the photographs of each split from the unpacked source."""
        raise NotImplementedError

    def options(self) -> str:
        """Returns the options that shape the content, for the key of the prepared folder."""
        return ""

    @property
    def report_path(self) -> Path:
        """CSV of the files that were skipped: split, id, reason."""
        return Path(self.data_dir).parent / "skipped.csv"

    @property
    def boxes_path(self) -> Path:
        """CSV of degenerate boxes, each replaced by the whole image: split, id, reason."""
        return Path(self.data_dir).parent / "boxes.csv"

    def skipped(self) -> list[dict[str, str]]:
        """Reads the report of a prepared data set: rows with the keys split, id, reason."""
        if not self.report_path.exists():
            return []
        with open(self.report_path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def download_and_prepare(self, **keywords) -> None:
        """Builds the data set unless it is built; see `tfds.core.DatasetBuilder`.

        Raises:
          ValueError: counts differ from the published ones, too many files are bad, or the
            source is not this data set. Nothing is left that looks complete.
        """
        build_once(self, partial(super().download_and_prepare, **keywords))
        with contextlib.suppress(OSError):  # A prepared data set may be read-only.
            write_atomically(Path(self.data_dir).parent / "source.json", json.dumps(self._made_of))
        # It may have been built earlier, under more generous options.
        self._check_skipped(
            sum(split.num_examples for split in self.info.splits.values()), self.skipped()
        )
        self._check_counts(self._written())

    def _built_earlier(self, data_dir: str | os.PathLike | None) -> str | None:
        """Returns the key of the data set that was made of a source deleted since."""
        root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser() / self.name
        built = [
            path.parent / str(self.VERSION)
            for path in root.glob("*/source.json")
            if json.loads(path.read_text(encoding="utf-8")) == self._made_of
        ]
        built = sorted((path.stat().st_mtime, path) for path in built if path.exists())
        return built[-1][1].parent.name if built else None

    def _locate(self, source: str) -> Path | None:
        """Returns the path of the source; None stands for a download to come."""
        if source == "auto":
            if self.DOWNLOAD:
                return None
            raise FileNotFoundError(
                f"{self.name}: no server is known to offer this archive any more, so "
                f"--config.data.source=auto cannot work. {self.HOW_TO_GET}"
            )
        if not source:
            also = " Or pass auto to download it." if self.DOWNLOAD else ""
            raise FileNotFoundError(
                f"{self.name}: --config.data.source says where the photographs are, and is not "
                f"set. {self.HOW_TO_GET}{also}"
            )
        path = Path(source).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"{self.name}: {path} does not exist. {self.HOW_TO_GET}")
        if path.is_file() and not archives.is_archive(path):
            raise ValueError(
                f"{self.name}: {path} is neither a folder nor an archive "
                f"({', '.join(archives.ARCHIVE_ENDINGS)}). {self.HOW_TO_GET}"
            )
        return path

    def _fingerprint(self) -> str:
        if self._source is None:
            return self.DOWNLOAD.sha256 or self.DOWNLOAD.url
        return archives.fingerprint(self._source)

    def _key(self) -> str:
        stem = "auto" if self._source is None else self._source.resolve().name
        mark = self._fingerprint()
        stem = re.sub(r"[^A-Za-z0-9]+", "_", stem).strip("_")[:40] or "source"
        return f"{stem}-{hashlib.sha256(f'{mark} {self.options()}'.encode()).hexdigest()[:12]}"

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": np.int64,
            "class_name": tfds.features.Text(),
            "id": tfds.features.Text(),
        }
        if self.BOXES:
            features["bbox"] = tfds.features.Tensor(shape=(4,), dtype=np.float32)
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(features),
        )

    def _create_builder_config(self, config, *args, **keywords):
        return config  # as TFDS does, but without its warning about unlisted configs

    def _download_and_prepare(self, dl_manager, download_config=None) -> None:
        del dl_manager
        source = self._source
        if source is None:
            source = archives.download(self.DOWNLOAD, Path(self.data_dir_root) / "downloads")
        with self.unpacked(source, Path(self.data_dir).parent) as folder:
            self._photographs = self.photographs(folder)
            self._check_photographs()
            self._skipped: list[tuple[str, str, str]] = []
            self._empty_boxes: list[tuple[str, str, str]] = []
            total = sum(map(len, self._photographs.values()))
            try:
                with progress(total, f"building {self.name}") as self._bar:
                    super()._download_and_prepare(None, download_config)
            finally:
                _write_report(self.report_path, self._skipped)
                if self.BOXES:
                    _write_report(self.boxes_path, self._empty_boxes)
        if self._skipped:
            log.warning(
                "%s: skipped %d files, listed with reasons in %s",
                self.name,
                len(self._skipped),
                self.report_path,
            )
        if self._empty_boxes:
            log.warning(
                "%s: %d boxes without area replaced by the whole image, listed in %s",
                self.name,
                len(self._empty_boxes),
                self.boxes_path,
            )
        self._check_counts(self._written())

    def _written(self) -> dict[str, tuple[None, int]]:
        """Returns the counts of the prepared data set, as `_check_counts` takes them."""
        return {name: (None, split.num_examples) for name, split in self.info.splits.items()}

    def _check_photographs(self) -> None:
        """Checks the lists of photographs, before anything big is read."""
        counts = {
            split: (len({row.label for row in rows}), len(rows))
            for split, rows in self._photographs.items()
        }
        self._check_counts(counts)
        for split, rows in self._photographs.items():
            if not rows:
                raise ValueError(
                    f"{self.name}: split {split} has no photographs. {self.HOW_TO_GET}"
                )
            twice = [i for i, count in Counter(row.id for row in rows).items() if count > 1]
            if twice:
                raise ValueError(
                    f"{self.name}: split {split} lists {len(twice)} photographs more than once, "
                    f"the first {twice[0]!r}; each would find itself as its nearest neighbour. "
                    "Remove the repetitions."
                )

    def _check_counts(self, found: dict[str, tuple[int | None, int]]) -> None:
        if self._allow_incomplete:
            return
        for split, (classes, images) in self.PUBLISHED.items():
            found_classes, found_images = found.get(split, (0, 0))
            wrong = []
            if found_images != images:
                wrong.append(f"expected {images:,} images, found {found_images:,}")
            if found_classes is not None and found_classes != classes:
                wrong.append(f"expected {classes:,} classes, found {found_classes:,}")
            if wrong:
                skipped = (
                    f" Files that could not be used are listed in {self.report_path}."
                    if self.report_path.exists()
                    else ""
                )
                raise ValueError(
                    f"{self.name}, split {split}: {' and '.join(wrong)}, so results would not "
                    "compare with published ones. The archive is probably not whole, or of "
                    f"another version.{skipped} To use what there is, pass "
                    "--config.data.allow_incomplete=True."
                )

    def _check_skipped(self, good: int, skipped: list) -> None:
        total = good + len(skipped)
        if len(skipped) > self._max_bad_fraction * total:
            raise ValueError(
                f"{self.name}: {len(skipped):,} of {total:,} files are missing or unreadable, "
                f"more than the share of {self._max_bad_fraction:g} that "
                "--config.data.max_bad_fraction allows. They are listed with reasons in "
                f"{self.report_path}."
            )

    def _shard_iterators_per_split(self, dl_manager):
        del dl_manager
        return {
            split: [
                lambda split=split, shard=shard: self._examples(split, shard)
                for shard in _shards(rows)
            ]
            for split, rows in self._photographs.items()
        }

    def _examples(self, split: str, rows: list[Photograph]) -> Iterator:
        total = sum(map(len, self._photographs.values()))
        for row, (data, shape, reason) in zip(rows, parallel(_read, rows), strict=True):
            self._bar.update()
            if reason:
                self._skipped.append((split, row.id, reason))
                if len(self._skipped) > self._max_bad_fraction * total:  # No need to go on.
                    self._check_skipped(total - len(self._skipped), self._skipped)
                continue
            example = {
                "image": data,
                "label": row.label,
                "class_name": _text(row.class_name),
                "id": _text(row.id),
            }
            if self.BOXES:
                example["bbox"] = self._clip(split, row, *shape)
            yield row.id, example

    def _clip(self, split: str, row: Photograph, height: int, width: int) -> np.ndarray:
        x0, y0, x1, y1 = row.bbox
        box = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
        if not (box[2] - box[0] >= 1 and box[3] - box[1] >= 1):
            reason = f"box {row.bbox} has no area inside of {width}x{height} pixels"
            self._empty_boxes.append((split, row.id, reason))
            box = 0, 0, width, height
        return np.asarray(box, np.float32)


def _read(row: Photograph) -> tuple[bytes, tuple[int, int], str]:
    """Returns the bytes of the file, (height, width), and what is wrong with it or ""."""
    try:
        data = row.path.read_bytes()
    except FileNotFoundError:
        return b"", (0, 0), "no such file"
    except OSError as error:
        return b"", (0, 0), f"cannot be read: {error.strerror}"
    try:
        return data, decode.check(data), ""
    except ValueError as error:
        return b"", (0, 0), str(error)


def _text(name: str) -> str:
    """Makes valid Unicode of a file name; old file systems hold others."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _shards(rows: list[Photograph]) -> Iterator[list[Photograph]]:
    shard, size = [], 0
    for row in rows:
        shard.append(row)
        size += row.path.stat().st_size if row.path.is_file() else 0
        if len(shard) == SHARD_IMAGES or size >= SHARD_BYTES:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _write_report(path: Path, rows: list[tuple[str, str, str]]) -> None:
    with (
        replacing(path) as part,
        open(part, "w", encoding="utf-8", errors="replace", newline="") as file,
    ):
        csv.writer(file).writerows([("split", "id", "reason"), *rows])


def build_once(builder: tfds.core.DatasetBuilder, build: Callable[[], None]) -> None:
    """Builds a TFDS data set unless it is on disk; of several processes at once, one does.

    Args:
      builder: of the data set.
      build: builds it, as `tfds.core.DatasetBuilder.download_and_prepare` does.
    """
    folder = Path(builder.data_dir).parent
    if not os.path.exists(builder.data_dir):  # A prepared data set may be read-only.
        with one_at_a_time(folder / "lock") as alone:
            if alone and not os.path.exists(builder.data_dir):
                for remains in folder.glob("incomplete.*"):  # of a process that was killed
                    shutil.rmtree(remains, ignore_errors=True)
            build()
    if not builder.info.splits:  # Another process built it since this object was made.
        builder.info.read_from_directory(builder.data_dir)
