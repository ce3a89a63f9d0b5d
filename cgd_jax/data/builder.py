"""What the builders of photographs share: from a list of files to a prepared data set.

A builder says which photographs make which split (`photographs`); here they are read,
checked, written and counted. TFDS would keep a whole split in memory to shuffle it (and
wants TensorFlow above a gigabyte), so the shards are written directly, in the order of the
data set's own lists; batches are shuffled at training time anyway.
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
from cgd_jax.runtime.files import one_at_a_time
from cgd_jax.runtime.threads import parallel

log = logging.getLogger(__name__)

# One shard is in memory while it is written.
SHARD_IMAGES, SHARD_BYTES = 1024, 128 << 20


class Photograph(NamedTuple):
    """One row of a split."""

    id: str  # the path in the archive
    path: Path  # where to read it
    label: int  # class number, unique over all splits
    class_name: str
    bbox: tuple[float, float, float, float] | None = None  # x0, y0, x1, y1 in pixels


class ImageBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Base of the builders that read what somebody downloaded.

    Examples have ``image`` (the encoded bytes as they were), ``label`` (int64), ``class_name``,
    ``id`` and, with ``BOXES``, ``bbox`` (float32 [4]: x0, y0, x1, y1 in pixels).

    The folder of a prepared data set is keyed by its source and options, so that another
    archive, or one that changed, is never taken for it. The source may be deleted afterwards.

    Args:
        source: path of the archive or folder; "auto" downloads where a server is known.
        allow_incomplete: go on although the counts differ from the published ones.
        max_bad_fraction: share of files, 0 to 1, that may be missing or unreadable.
        data_dir: where prepared data sets live.
        **keywords: as for `tfds.core.DatasetBuilder`.

    Raises:
        FileNotFoundError: no such source, or none given; says what to get and where.
    """

    VERSION = tfds.core.Version("1.0.0")
    PUBLISHED: ClassVar[dict[str, tuple[int, int]]] = {}  # split → classes, images
    WANTED: ClassVar[str] = ""  # what to get, where people get it
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
        self._origin = {
            "source": os.path.abspath(os.path.expanduser(source)),
            "options": self.options(),
        }
        key = None if os.path.exists(self._origin["source"]) else self._built_earlier(data_dir)
        if key is None:
            self._source = self._locate(str(source))
            key = self._key()
        keywords.setdefault("file_format", "array_record")
        super().__init__(data_dir=data_dir, config=tfds.core.BuilderConfig(name=key), **keywords)

    unpacked = staticmethod(archives.unpacked)  # archive → folder, for the time of the build

    def photographs(self, folder: Path) -> dict[str, list[Photograph]]:
        """The photographs of each split, listed from the unpacked folder."""
        raise NotImplementedError

    def options(self) -> str:
        """Options that change what is built, for the key of the prepared folder."""
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
        """Rows of the report of a prepared data set, with keys split, id, reason."""
        if not self.report_path.exists():
            return []
        with open(self.report_path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def download_and_prepare(self, **keywords) -> None:
        """Build the data set unless it is built; see `tfds.core.DatasetBuilder`.

        Raises:
            ValueError: counts differ from the published ones, too many bad files, or the
                source is not this data set. Nothing is left that looks complete.
        """
        folder = Path(self.data_dir).parent
        build_once(self, partial(super().download_and_prepare, **keywords))
        with contextlib.suppress(OSError):
            part = folder / f"incomplete.{os.getpid()}.json"
            part.write_text(json.dumps(self._origin), encoding="utf-8")
            part.replace(folder / "source.json")
        # Also of one built earlier, perhaps under more generous options.
        self._check_bad(
            sum(split.num_examples for split in self.info.splits.values()), self.skipped()
        )
        self._check_counts(
            {name: (None, split.num_examples) for name, split in self.info.splits.items()}
        )

    def _built_earlier(self, data_dir: str | os.PathLike | None) -> str | None:
        """Key of the data set made of a source that has been deleted since, to save disk."""
        root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser() / self.name
        built = [
            path.parent / str(self.VERSION)
            for path in root.glob("*/source.json")
            if json.loads(path.read_text(encoding="utf-8")) == self._origin
        ]
        built = sorted((path.stat().st_mtime, path) for path in built if path.exists())
        return built[-1][1].parent.name if built else None

    def _locate(self, source: str) -> Path | None:
        """The source's path; None stands for a download to come."""
        if source == "auto":
            if self.DOWNLOAD:
                return None
            raise FileNotFoundError(
                f"{self.name}: no server is known to offer this archive any more, so "
                f"--config.data.source=auto cannot work. {self.WANTED}"
            )
        if not source:
            also = " Or pass auto to download it." if self.DOWNLOAD else ""
            raise FileNotFoundError(
                f"{self.name}: --config.data.source says where the photographs are, and is not "
                f"set. {self.WANTED}{also}"
            )
        path = Path(source).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"{self.name}: {path} does not exist. {self.WANTED}")
        if path.is_file() and not archives.is_archive(path):
            raise ValueError(
                f"{self.name}: {path} is neither a folder nor an archive "
                f"({', '.join(archives.ARCHIVE_ENDINGS)}). {self.WANTED}"
            )
        return path

    def _fingerprint(self) -> str:
        if self._source is None:
            return self.DOWNLOAD.sha256 or self.DOWNLOAD.url
        return archives.fingerprint(self._source)

    def _key(self) -> str:
        stem = "auto" if self._source is None else self._source.resolve().name
        mark = self._fingerprint()
        # Without a separator inside: the name is that of a folder.
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
        return config  # As TFDS does, but without a warning that it is not in a list.

    def _download_and_prepare(self, dl_manager, download_config=None) -> None:
        del dl_manager
        source = self._source
        if source is None:
            source = archives.download(self.DOWNLOAD, Path(self.data_dir_root) / "downloads")
        with self.unpacked(source, Path(self.data_dir).parent) as folder:
            self._photographs = self.photographs(folder)
            self._check_list()
            self._skipped: list[tuple[str, str, str]] = []
            self._degenerate: list[tuple[str, str, str]] = []
            total = sum(map(len, self._photographs.values()))
            try:
                with progress(total, f"building {self.name}") as self._update:
                    super()._download_and_prepare(None, download_config)
            finally:
                _write_report(self.report_path, self._skipped)
                if self.BOXES:
                    _write_report(self.boxes_path, self._degenerate)
        if self._skipped:
            log.warning(
                "%s: skipped %d files, listed with reasons in %s",
                self.name,
                len(self._skipped),
                self.report_path,
            )
        if self._degenerate:
            log.warning(
                "%s: %d boxes without area replaced by the whole image, listed in %s",
                self.name,
                len(self._degenerate),
                self.boxes_path,
            )
        self._check_counts(
            {name: (None, split.num_examples) for name, split in self.info.splits.items()}
        )

    def _check_list(self) -> None:
        """Whether the lists are those of the published set, before anything big is read."""
        counts = {
            split: (len({row.label for row in rows}), len(rows))
            for split, rows in self._photographs.items()
        }
        self._check_counts(counts)
        for split, rows in self._photographs.items():
            if not rows:
                raise ValueError(f"{self.name}: split {split} has no photographs. {self.WANTED}")
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

    def _check_bad(self, good: int, skipped: list) -> None:
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
            self._update(1)
            if reason:
                self._skipped.append((split, row.id, reason))
                if len(self._skipped) > self._max_bad_fraction * total:  # No need to go on.
                    self._check_bad(total - len(self._skipped), self._skipped)
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
            self._degenerate.append((split, row.id, reason))
            box = 0, 0, width, height
        return np.asarray(box, np.float32)


def _read(row: Photograph) -> tuple[bytes, tuple[int, int], str]:
    """The file's bytes, (height, width), and what is wrong with it or ""."""
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
    """A file name as valid Unicode; old file systems hold others."""
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
    with open(path, "w", encoding="utf-8", errors="replace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("split", "id", "reason"))
        writer.writerows(rows)


def build_once(builder, build: Callable[[], None]) -> None:
    """Build a TFDS data set unless it is on disk; of several processes at once, one does.

    Args:
        builder: of the data set.
        build: its way to build it, `tfds.core.DatasetBuilder.download_and_prepare`.
    """
    folder = Path(builder.data_dir).parent
    if not os.path.exists(builder.data_dir):  # Else it may well be read-only.
        with one_at_a_time(folder / "lock") as alone:
            if alone and not os.path.exists(builder.data_dir):
                for remains in folder.glob("incomplete.*"):  # of a run that was killed
                    shutil.rmtree(remains, ignore_errors=True)
            build()
    if not builder.info.splits:  # Another process built it since this object was made.
        builder.info.read_from_directory(builder.data_dir)
