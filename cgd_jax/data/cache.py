"""Images of one split as an array of equal squares, from a file or decoded as asked for.

Decoding a photograph takes milliseconds, copying 252×252 finished pixels microseconds. So
the deterministic part of the preparation (decode, crop to the box, resize) happens once, into
a memory-mapped .npy file that every run on the machine shares: the operating system keeps in
memory what is used, and gives it back when somebody needs the room.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cgd_jax.data.decode import decode
from cgd_jax.runtime.console import progress
from cgd_jax.runtime.files import one_at_a_time
from cgd_jax.runtime.threads import parallel

log = logging.getLogger(__name__)

# Raised whenever decode.py would give other pixels for the same bytes.
FORMAT = 1
CHUNK = 16  # examples that a thread takes at once


class Resized:
    """Images in a memory-mapped file.

    Attributes:
        images: uint8 [N, size, size, 3], read-only, backed by the file.
        labels: int64 [N].
        ids: N names, the paths in the archive.
        class_names: class number → name.
    """

    def __init__(self, folder: Path):
        """Open a finished cache; raises ValueError or OSError if it is not whole."""
        with open(folder / "key.json", encoding="utf-8") as file:
            stored = json.load(file)
        for name, size in stored["bytes"].items():
            found = (folder / name).stat().st_size
            if found != size:
                raise ValueError(f"{folder / name} has {found:,} bytes instead of {size:,}")
        self.key = stored["key"]
        self.images = np.load(folder / "images.npy", mmap_mode="r")
        self.labels = np.load(folder / "labels.npy")
        self.ids = json.loads((folder / "ids.json").read_text(encoding="utf-8"))
        names = json.loads((folder / "class_names.json").read_text(encoding="utf-8"))
        self.class_names = {int(label): name for label, name in names.items()}
        side = self.key["size"]
        if (
            self.images.dtype != np.uint8
            or self.images.shape != (len(self.labels), side, side, 3)
            or len(self.ids) != len(self.labels)
        ):
            raise ValueError(f"{folder} holds arrays of the wrong shape")


class Decoded:
    """Images that are decoded when asked for, on all cores; for sets larger than the disk.

    ``decoded[indices]`` gives what ``Resized(...).images[indices]`` would.

    Attributes:
        labels: int64 [N], read once at the start, like the two below.
        ids: N names, the paths in the archive.
        class_names: class number → name.
        shape: of all images together, [N, size, size, 3].
    """

    def __init__(self, source: Sequence[dict[str, Any]], size: int, crop: bool = True):
        """See `resized` for the arguments."""
        self._source, self._size, self._crop = source, size, crop
        self.shape = (len(source), size, size, 3)
        self.labels, self.ids, self.class_names = np.zeros(len(source), np.int64), [], {}
        with progress(len(source), "reading labels") as update:
            for chunk in _chunks(np.arange(len(source))):
                for i, example in zip(chunk, source.__getitems__(chunk), strict=True):
                    self.labels[i] = example["label"]
                    self.ids.append(_text(example["id"]))
                    self.class_names[int(example["label"])] = _text(example["class_name"])
                update(len(chunk))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Decode the images [B] with these numbers to uint8 [B, size, size, 3]."""
        indices = np.asarray(indices, np.intp)
        images = np.empty((len(indices), self._size, self._size, 3), np.uint8)

        def work(chunk):
            places, numbers = zip(*chunk, strict=True)
            for place, example in zip(places, self._source.__getitems__(numbers), strict=True):
                images[place] = pixels(example, self._size, self._crop)

        pairs = list(enumerate(indices.tolist()))
        for _ in parallel(work, (pairs[i : i + 4] for i in range(0, len(pairs), 4))):
            pass
        return images


def pixels(example: dict[str, Any], size: int, crop: bool) -> np.ndarray:
    """Decode one example to uint8 [size, size, 3], cropped to its box if it has one.

    Raises:
        ValueError: the image cannot be decoded; names it.
    """
    try:
        return decode(example["image"], example.get("bbox") if crop else None, size)
    except ValueError as error:
        raise ValueError(f"Image {_text(example['id'])}: {error}.") from error


def resized(
    source: Sequence[dict[str, Any]],
    folder: str | os.PathLike,
    key: dict[str, Any],
    size: int,
    crop: bool = True,
) -> Resized:
    """Return the cache of a split, building it first unless it is there.

    Args:
        source: examples of a TFDS data source made with
            ``decoders={"image": tfds.decode.SkipDecoding()}``: dicts of ``image`` (encoded
            bytes), ``label``, ``class_name``, ``id`` and perhaps ``bbox``; read by
            ``source.__getitems__``.
        folder: where caches live, beside the data set.
        key: what tells this split from any other: name, version, fingerprint, split. Size,
            crop, number of images and the way of resizing are added here.
        size: side of the square in pixels.
        crop: whether to cut out the ``bbox`` of examples that have one.

    Returns:
        The images, memory-mapped, with labels and ids.

    Raises:
        OSError: not enough free disk; says how much is missing and what to do.
        ValueError: an image cannot be decoded.

    Processes that ask for the same cache at once build it once: the others wait. A cache that
    is damaged or cut short is built again. Nothing is visible under the final name before it
    is whole.
    """
    folder = Path(folder)
    key = {**key, "size": size, "crop": crop, "images": len(source), "format": FORMAT}
    text = json.dumps(key, sort_keys=True, default=str)
    key = json.loads(text)
    target = folder / f"{size}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if cache := _open(target, key):
        return cache
    with one_at_a_time(folder / f"{target.name}.lock") as alone:
        if cache := _open(target, key):  # Built while we waited.
            return cache
        if alone:
            for remains in folder.glob(f"incomplete.{target.name}.*"):  # of a run that was killed
                shutil.rmtree(remains, ignore_errors=True)
        part = Path(tempfile.mkdtemp(prefix=f"incomplete.{target.name}.", dir=folder))
        try:
            _build(source, part, key)
            if target.exists() and not _open(target, key):
                shutil.rmtree(target, ignore_errors=True)
            with contextlib.suppress(OSError):  # Another process was faster.
                os.rename(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return Resized(target)


def _open(folder: Path, key: dict[str, Any]) -> Resized | None:
    """The cache in a folder, or None if there is none or not a good one."""
    if not folder.exists():
        return None
    try:
        cache = Resized(folder)
        if cache.key != key:
            raise ValueError(f"{folder} belongs to {cache.key}")
        return cache
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("The cache is damaged and will be built again: %s.", error)
        return None


def _build(source: Sequence[dict[str, Any]], folder: Path, key: dict[str, Any]) -> None:
    count, size, crop = len(source), key["size"], key["crop"]
    row = size * size * 3
    needed, free = count * row, shutil.disk_usage(folder).free
    announcement = (
        f"the cache of {count:,} images of {size}x{size} pixels takes {needed / 1e9:.2f} GB in "
        f"{folder.parent}, where {free / 1e9:.2f} GB are free"
    )
    if needed * 1.01 + (16 << 20) > free:
        raise OSError(
            f"Not enough disk: {announcement}. Free some, let --config.data.dir point to a larger "
            "disk, or decode on the fly with --config.data.cache=none."
        )
    log.info("Building: %s.", announcement)
    labels, ids, class_names = np.zeros(count, np.int64), [""] * count, {}

    with open(folder / "images.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
        )
        file.flush()
        start = file.tell()

        def work(chunk):
            images = np.empty((len(chunk), size, size, 3), np.uint8)
            for i, number, example in zip(
                range(len(chunk)), chunk, source.__getitems__(chunk), strict=True
            ):
                images[i] = pixels(example, size, crop)
                labels[number], ids[number] = example["label"], _text(example["id"])
                class_names[int(example["label"])] = _text(example["class_name"])
            # Writing, unlike touching pages of a memory map, reports a full disk.
            data, offset = memoryview(images).cast("B"), start + chunk[0] * row
            while data:
                written = os.pwrite(file.fileno(), data, offset)
                data, offset = data[written:], offset + written
            return len(chunk)

        with progress(count, "resizing images") as update:
            for done in parallel(work, _chunks(range(count))):
                update(done)
        os.fsync(file.fileno())
    np.save(folder / "labels.npy", labels)
    (folder / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
    (folder / "class_names.json").write_text(json.dumps(class_names), encoding="utf-8")
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    with open(folder / "key.json", "w", encoding="utf-8") as file:
        json.dump({"key": key, "bytes": sizes}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _chunks(numbers: Sequence[int]):
    return ([int(i) for i in numbers[at : at + CHUNK]] for at in range(0, len(numbers), CHUNK))


def _text(name: bytes | str) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
