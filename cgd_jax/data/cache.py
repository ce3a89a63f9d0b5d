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
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cgd_jax.data import Split
from cgd_jax.data.decode import decode, may_be_float
from cgd_jax.runtime.console import progress, quantity
from cgd_jax.runtime.files import replacing
from cgd_jax.runtime.locks import one_at_a_time
from cgd_jax.runtime.threads import parallel

log = logging.getLogger(__name__)

# Raised whenever decode.py would give other pixels for the same bytes.
FORMAT = 1
CHUNK = 16  # examples that a thread takes at once


class Source(Protocol):
    """A TFDS data source made with `decoders={"image": tfds.decode.SkipDecoding()}`.

    Its examples are dicts of `image` (encoded bytes), `label`, `class_name`, `id` and perhaps
    `bbox`.
    """

    def __len__(self) -> int: ...

    def __getitems__(self, numbers: list[int]) -> Sequence[dict[str, Any]]: ...


def cached(
    source: Source, folder: str | os.PathLike, key: dict[str, Any], size: int, crop: bool = True
) -> Split:
    """Opens the cache of a split, building it first unless it is there.

    Processes that ask for the same cache at once build it once: the others wait. A cache that
    is damaged or cut short is built again. Nothing is visible under the final name before it
    is whole.

    Args:
      source: examples of the split, see `Source`.
      folder: of all caches of the data set.
      key: tells this split from any other: name, version, fingerprint, split. Size, crop,
        number of images and the way of resizing are added here.
      size: side of the squares in pixels.
      crop: whether to cut out the `bbox` of examples that have one.

    Returns:
      The split, its images memory-mapped and read-only.

    Raises:
      OSError: not enough free disk; says how much is missing and what to do.
      ValueError: an image cannot be decoded.
    """
    folder = Path(folder)
    key = {**key, "size": size, "crop": crop, "images": len(source), "format": FORMAT}
    text = json.dumps(key, sort_keys=True, default=str)
    key = json.loads(text)
    target = folder / f"{size}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if split := _open_if_good(source, target, key):
        return split
    with one_at_a_time(folder / f"{target.name}.lock") as alone:
        if split := _open_if_good(source, target, key):  # Another process built it meanwhile.
            return split
        if alone:
            for remains in folder.glob(f"incomplete.{target.name}.*"):  # of a killed process
                shutil.rmtree(remains, ignore_errors=True)
        part = folder / f"incomplete.{target.name}.{uuid.uuid4().hex[:8]}"
        part.mkdir()
        try:
            _build(source, part, key)
            if target.exists() and not _open_if_good(source, target, key):
                shutil.rmtree(target, ignore_errors=True)
            with contextlib.suppress(OSError):  # Without locks another may have been faster.
                os.rename(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return _open(source, target, key)


def decoded(source: Source, size: int, crop: bool = True) -> Split:
    """Opens a split whose images are decoded when asked for; for sets larger than the disk.

    Args:
      source: examples of the split, see `Source`; all are read once, for their labels.
      size: side of the squares in pixels.
      crop: whether to cut out the `bbox` of examples that have one.

    Returns:
      The split; `images[indices]` gives what the cached images would.
    """
    labels, contents = np.zeros((2, len(source)), np.int64)
    ids, class_names = [], {}
    with progress(len(source), "reading labels") as bar:
        for chunk in _chunks(len(source)):
            for i, example in zip(chunk, source.__getitems__(chunk), strict=True):
                labels[i], contents[i] = example["label"], content(example, crop)
                ids.append(_text(example["id"]))
                class_names[int(example["label"])] = _text(example["class_name"])
            bar.update(len(chunk))
    images = DecodedImages(source, size, crop)
    return Split(images, labels, ids, class_names, contents=contents)


class DecodedImages:
    """Images that are decoded on all cores when they are asked for.

    Attributes:
      shape: of all images together, [N, size, size, 3].
    """

    def __init__(self, source: Source, size: int, crop: bool):
        self._source, self._size, self._crop = source, size, crop
        self.shape = (len(source), size, size, 3)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Decodes the images [B] with these numbers to uint8 [B, size, size, 3]."""
        numbers = np.asarray(indices, np.intp).tolist()
        images = np.empty((len(numbers), *self.shape[1:]), np.uint8)

        def work(places: range) -> None:
            examples = self._source.__getitems__([numbers[place] for place in places])
            for place, example in zip(places, examples, strict=True):
                images[place] = pixels(example, self._size, self._crop)

        for _ in parallel(work, _ranges(len(numbers), 4)):
            pass
        return images


def pixels(example: dict[str, Any], size: int, crop: bool) -> np.ndarray:
    """Decodes one example to uint8 [size, size, 3], cropped to its box if it has one.

    Raises:
      ValueError: the image cannot be decoded; names it.
    """
    try:
        return decode(example["image"], example.get("bbox") if crop else None, size)
    except ValueError as error:
        raise ValueError(f"Image {_text(example['id'])}: {error}.") from error


def content(example: dict[str, Any], crop: bool) -> int:
    """Returns a number of 64 bits, equal for two examples with the same file and box."""
    digest = hashlib.blake2b(example["image"], digest_size=8)
    if crop and "bbox" in example:
        digest.update(np.asarray(example["bbox"], "<f4").tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def _contents(source: Source, folder: Path, crop: bool) -> np.ndarray:
    """Reads `content` of all examples, kept beside the cache; older caches lack it."""
    path = folder / "contents.npy"
    if path.exists():
        contents = np.load(path)
        if contents.dtype != np.int64 or contents.shape != (len(source),):
            raise ValueError(f"{path} holds an array of the wrong shape")
        return contents

    def work(chunk: list[int]) -> list[int]:
        examples = source.__getitems__(chunk)
        if any(may_be_float(example["image"]) for example in examples):
            raise ValueError(f"{folder} is of a version that read floating-point pictures as black")
        return [content(example, crop) for example in examples]

    contents = np.array(
        [i for part in parallel(work, _chunks(len(source))) for i in part], np.int64
    )
    with contextlib.suppress(OSError), replacing(path) as part:  # It may be read-only.
        np.save(part, contents)
    return contents


def _open(source: Source, folder: Path, key: dict[str, Any]) -> Split:
    """Opens a finished cache; raises ValueError, OSError, KeyError or TypeError if it is not."""
    stored = json.loads((folder / "key.json").read_text(encoding="utf-8"))
    if stored["key"] != key:
        raise ValueError(f"{folder} belongs to {stored['key']}")
    for name, size in stored["bytes"].items():
        found = (folder / name).stat().st_size
        if found != size:
            raise ValueError(f"{folder / name} has {found:,} bytes instead of {size:,}")
    images = np.load(folder / "images.npy", mmap_mode="r")
    labels = np.load(folder / "labels.npy")
    ids = json.loads((folder / "ids.json").read_text(encoding="utf-8"))
    names = json.loads((folder / "class_names.json").read_text(encoding="utf-8"))
    shape = (key["images"], key["size"], key["size"], 3)
    if images.dtype != np.uint8 or images.shape != shape or not len(labels) == len(ids) == shape[0]:
        raise ValueError(f"{folder} holds arrays of the wrong shape")
    class_names = {int(label): name for label, name in names.items()}
    contents = _contents(source, folder, key["crop"])
    return Split(images, labels, ids, class_names, contents=contents)


def _open_if_good(source: Source, folder: Path, key: dict[str, Any]) -> Split | None:
    if not folder.exists():
        return None
    try:
        return _open(source, folder, key)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("The cache cannot be used and is built again: %s.", error)
        return None


def _build(source: Source, folder: Path, key: dict[str, Any]) -> None:
    count, size, crop = len(source), key["size"], key["crop"]
    row = size * size * 3
    needed, free = count * row, shutil.disk_usage(folder).free
    announcement = (
        f"the cache of {count:,} images of {size}x{size} pixels takes {quantity(needed, 'B')} "
        f"in {folder.parent}, where {quantity(free, 'B')} are free"
    )
    if needed * 1.01 + (16 << 20) > free:
        raise OSError(
            f"Not enough disk: {announcement}. Free some, let --config.data.dir point to a larger "
            "disk, or decode on the fly with --config.data.cache=none."
        )
    log.info("Building: %s.", announcement)
    labels, contents = np.zeros((2, count), np.int64)
    ids, class_names = [""] * count, {}

    with open(folder / "images.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
        )
        file.flush()
        start = file.tell()

        def work(chunk: list[int]) -> int:
            images = np.empty((len(chunk), size, size, 3), np.uint8)
            examples = source.__getitems__(chunk)
            for image, number, example in zip(images, chunk, examples, strict=True):
                image[:] = pixels(example, size, crop)
                labels[number], contents[number] = example["label"], content(example, crop)
                ids[number] = _text(example["id"])
                class_names[int(example["label"])] = _text(example["class_name"])
            # Writing, unlike touching pages of a memory map, reports a full disk.
            data, offset = images.data.cast("B"), start + chunk[0] * row
            while data:
                written = os.pwrite(file.fileno(), data, offset)
                data, offset = data[written:], offset + written
            return len(chunk)

        with progress(count, "resizing images") as bar:
            for done in parallel(work, _chunks(count)):
                bar.update(done)
        os.fsync(file.fileno())
    np.save(folder / "labels.npy", labels)
    np.save(folder / "contents.npy", contents)
    (folder / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
    (folder / "class_names.json").write_text(json.dumps(class_names), encoding="utf-8")
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    with open(folder / "key.json", "w", encoding="utf-8") as key_file:
        json.dump({"key": key, "bytes": sizes}, key_file, indent=1)
        key_file.flush()
        os.fsync(key_file.fileno())


def _ranges(count: int, length: int) -> Iterator[range]:
    return (range(at, min(at + length, count)) for at in range(0, count, length))


def _chunks(count: int) -> Iterator[list[int]]:
    return map(list, _ranges(count, CHUNK))


def _text(name: bytes | str) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
