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
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from cgd_jax.data import archives, decode
from cgd_jax.data.dataset import listed
from cgd_jax.runtime.console import progress
from cgd_jax.runtime.files import replacing, write_atomically
from cgd_jax.runtime.locks import one_at_a_time
from cgd_jax.runtime.threads import parallel

log = logging.getLogger(__name__)

# What a build notes about single files → what is said of it.
REPORTS = {
    "skipped": "files are missing or unreadable",
    "left_out": "files are left out",
    "boxes": "boxes have no area, and stand for the whole image",
    "blank": "images are blank (files of 16 bits are read as 0 to 65,535: scale those that hold "
    "0 to 4,095 or 0 to 255)",
}

# TFDS holds one shard in memory while it is written.
SHARD_IMAGES, SHARD_BYTES = 1024, 128 << 20


class Photograph(NamedTuple):
    """One photograph of a split, before it is read."""

    id: str  # its path within the source
    path: Path
    label: int  # class number, unique over all splits
    class_name: str
    bbox: tuple[float, float, float, float] | None = None  # x0, y0, x1, y1 in pixels


class ImageBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
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
            built_in = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser().resolve()
            if isinstance(self._source, Path) and built_in.is_relative_to(self._source.resolve()):
                raise ValueError(
                    f"{self.name}: data sets are built in {built_in}, which lies in "
                    f"{self._source}, where the photographs are; they would be another source "
                    "after every build. Let --config.data.dir=FOLDER name a folder outside of it."
                )
            key = self._key()
        keywords.setdefault("file_format", "array_record")
        super().__init__(data_dir=data_dir, config=tfds.core.BuilderConfig(name=key), **keywords)

    unpacked = staticmethod(archives.unpacked)  # source → folders, while the data set is built

    def photographs(self, folders: list[Path]) -> dict[str, list[Photograph]]:
        """Lists the photographs of each split from the unpacked source."""
        raise NotImplementedError

    def options(self) -> str:
        """Returns the options that shape the content, for the key of the prepared folder."""
        return ""

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
        """Builds the data set unless it is built; see `tfds.core.DatasetBuilder`.

        Raises:
          ValueError: counts differ from the published ones, too many files are bad, or the
            source is not this data set. Nothing is left that looks complete.
        """
        build_once(self, partial(super().download_and_prepare, **keywords))
        with contextlib.suppress(OSError):  # A prepared data set may be read-only.
            write_atomically(Path(self.data_dir).parent / "source.json", json.dumps(self._made_of))
        # It may have been built earlier, under more generous options.
        self._check_written(self.report("skipped"))
        for name, text in REPORTS.items():
            if rows := self.report(name):
                path = self.report_path(name)
                log.warning("%s: %d %s: %s. See %s", self.name, len(rows), text, _kinds(rows), path)

    def _built_earlier(self, data_dir: str | os.PathLike | None) -> str | None:
        """Returns the key of the data set that was made of a source deleted since."""
        root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser() / self.name
        built = []
        for path in root.glob("*/source.json"):
            prepared = path.parent / str(self.VERSION)
            with contextlib.suppress(OSError, ValueError):
                if json.loads(path.read_text(encoding="utf-8")) == self._made_of:
                    built.append((prepared.stat().st_mtime, prepared))
        return max(built)[1].parent.name if built else None

    def _locate(self, source: str) -> Path | archives.Download:
        """Returns where the source is."""
        if source == "auto":
            if self.DOWNLOAD:
                return self.DOWNLOAD
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
        if isinstance(self._source, archives.Download):
            return self._source.sha256 or self._source.url
        return archives.fingerprint(self._source)

    def _key(self) -> str:
        stem = self._source.resolve().name if isinstance(self._source, Path) else "auto"
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
        if isinstance(source, archives.Download):
            source = archives.download(source, Path(self.data_dir_root) / "downloads")
        with self.unpacked(source, Path(self.data_dir).parent) as folders:
            self._notes: dict[str, list] = {name: [] for name in REPORTS}
            self._photographs = self.photographs(folders)
            self._check_photographs()
            total = sum(map(len, self._photographs.values()))
            try:
                with progress(total, f"building {self.name}") as self._bar:
                    super()._download_and_prepare(None, download_config)
            finally:
                for name, rows in self._notes.items():
                    _write_report(self.report_path(name), rows)
        self._check_written(self._notes["skipped"])

    def _check_written(self, skipped: list[dict[str, str]]) -> None:
        """Checks what is in the shards, and the share of files that are not."""
        counts = {name: split.num_examples for name, split in self.info.splits.items()}
        total = sum(counts.values()) + len(skipped)
        if len(skipped) > self._max_bad_fraction * total:
            raise ValueError(
                f"{self.name}: {len(skipped):,} of {total:,} files are missing or unreadable, "
                f"more than the share of {self._max_bad_fraction:g} that "
                f"--config.data.max_bad_fraction allows: {_kinds(skipped)}. They are listed with "
                f"reasons in {self.report_path('skipped')}."
            )
        for name, count in counts.items():
            if not count:
                raise ValueError(
                    f"{self.name}: none of the photographs of split {name} can be read: "
                    f"{_kinds([row for row in skipped if row['split'] == name])}."
                )
        self._check_counts({name: (None, count) for name, count in counts.items()})

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

    def _check_counts(self, found: Mapping[str, tuple[int | None, int]]) -> None:
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
                path = self.report_path("skipped")
                skipped = (
                    f" Files that could not be used are listed in {path}." if path.exists() else ""
                )
                raise ValueError(
                    f"{self.name}, split {split}: {' and '.join(wrong)}, so results would not "
                    "compare with published ones. The archive is probably not whole, or of "
                    f"another version.{skipped} To use what there is, pass "
                    "--config.data.allow_incomplete=True."
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
        for row, (data, shape, blank, reason) in zip(rows, parallel(_read, rows), strict=True):
            self._bar.update()
            if reason:
                self.note("skipped", split, row.id, reason)
                continue
            if blank:
                self.note("blank", split, row.id, "nearly black or of one colour")
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
        x0, y0, x1, y1 = row.bbox or (0, 0, 0, 0)
        box = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
        if not (box[2] - box[0] >= 1 and box[3] - box[1] >= 1):
            reason = f"box {row.bbox} has no area inside of {width}x{height} pixels"
            self.note("boxes", split, row.id, reason)
            box = 0, 0, width, height
        return np.asarray(box, np.float32)


def _read(row: Photograph) -> tuple[bytes, tuple[int, int], bool, str]:
    """Returns the bytes of a file, (height, width), whether it is blank, what is wrong or ""."""
    try:
        if not stat.S_ISREG(row.path.stat().st_mode):  # Reading a pipe would never end.
            raise ValueError("not a file")
        data = row.path.read_bytes()
        height, width, blank = decode.check(data)
        return data, (height, width), blank, ""
    except FileNotFoundError:
        reason = "a link to nowhere" if row.path.is_symlink() else "no such file"
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    except ValueError as error:
        reason = str(error)
    return b"", (0, 0), False, reason


def _text(name: str) -> str:
    """Makes valid Unicode of a file name; old file systems hold others."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _shards(rows: list[Photograph]) -> Iterator[list[Photograph]]:
    shard, size = [], 0
    for row in rows:
        shard.append(row)
        with contextlib.suppress(OSError):
            size += row.path.stat().st_size
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
