"""Images of one split as an array of equal squares, from a file or decoded as asked for.

Decoding a photo takes milliseconds, copying 252×252 finished pixels microseconds. So the
deterministic part of the preparation (decode, crop to the box, resize) happens once, into a
memory-mapped .npy file that every run on the machine shares: the operating system keeps in
memory what is used, and gives it back when somebody needs the room.

A source is a TFDS data source made with `decoders={"image": tfds.decode.SkipDecoding()}`: it has
a length, and `__getitems__` of a list of numbers gives dicts of `image` (encoded bytes), `label`,
`class_name`, `id` and perhaps `bbox`.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from cgd_jax.data.dataset import Split, printable
from cgd_jax.data.decode import decode
from cgd_jax.runtime.console import progress, quantity
from cgd_jax.runtime.locks import one_at_a_time
from cgd_jax.runtime.threads import parallel

log = logging.getLogger(__name__)

# Raised whenever decode.py would give other pixels for the same bytes.
FORMAT = 2
CHUNK = 16  # examples that a thread takes at once


def cached(
    source: Any, folder: str | os.PathLike, key: dict[str, Any], size: int, crop: bool = True
) -> Split:
    """Opens the cache of a split, building it first unless it is there and whole.

    `key` tells the split from any other; size, crop (whether to cut out boxes), number of images
    and the way of resizing are added. Processes that ask at once build it once, and nothing has its
    final name before it is whole. Raises OSError where the disk is too small.
    """
    key = {**key, "size": size, "crop": crop, "images": len(source), "format": FORMAT}
    text = json.dumps(key, sort_keys=True)
    target = Path(folder, f"{size}-{hashlib.sha256(text.encode()).hexdigest()[:16]}")
    if split := _open_if_good(target, text):
        return split
    with one_at_a_time(target.with_name(f"{target.name}.lock")) as alone:
        if split := _open_if_good(target, text):  # Another process built it meanwhile.
            return split
        incomplete = f"incomplete.{target.name}."
        if alone:
            for remains in target.parent.glob(f"{incomplete}*"):  # of a killed process
                shutil.rmtree(remains, ignore_errors=True)
        part = target.with_name(incomplete + uuid.uuid4().hex[:8])
        part.mkdir()
        try:
            _build(source, part, text, size, crop)
            if not _open_if_good(target, text):
                shutil.rmtree(target, ignore_errors=True)
            with contextlib.suppress(OSError):  # Without locks another may have been faster.
                os.rename(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return _open(target, text)


def decoded(source: Any, size: int, crop: bool = True) -> Split:
    """Opens a split whose images are decoded when asked for; for sets larger than the disk.

    All examples are read once, for their labels.
    """
    rows: list[tuple] = []
    with progress(len(source), "reading labels") as bar:
        for numbers in _chunks(range(len(source)), CHUNK):
            rows += [_describe(example, crop) for example in source.__getitems__(numbers)]
            bar.update(len(numbers))
    return _split(DecodedImages(source, size, crop), rows)


class DecodedImages:
    """Images [N, size, size, 3] that are decoded on all cores when they are asked for."""

    def __init__(self, source: Any, size: int, crop: bool):
        self._source, self._size, self._crop = source, size, crop
        self.shape = (len(source), size, size, 3)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Decodes the images [B] with these numbers to uint8 [B, size, size, 3]."""

        def work(numbers: list[int]) -> np.ndarray:
            return pixels(self._source.__getitems__(numbers), self._size, self._crop)

        chunks = _chunks(np.asarray(indices, np.intp).tolist(), 4)
        none = np.empty((0, *self.shape[1:]), np.uint8)
        return np.concatenate([none, *parallel(work, chunks)])


def pixels(examples: list[dict[str, Any]], size: int, crop: bool) -> np.ndarray:
    """Decodes examples to uint8 [B, size, size, 3], cropped to their boxes if they have any."""
    images = np.empty((len(examples), size, size, 3), np.uint8)
    for image, example in zip(images, examples, strict=True):
        try:
            image[:] = decode(example["image"], example.get("bbox") if crop else None, size)
        except ValueError as error:
            raise ValueError(f"Image {_text(example['id'])}: {error}.") from error
    return images


def _describe(example: dict[str, Any], crop: bool) -> tuple[int, int, str, str]:
    """Returns label, content, id and class name of an example.

    Its content is a number of 64 bits, equal for two examples with the same file and box.
    """
    digest = hashlib.blake2b(example["image"], digest_size=8)
    if crop and "bbox" in example:
        digest.update(np.asarray(example["bbox"], "<f4").tobytes())
    content = int.from_bytes(digest.digest(), "little", signed=True)
    return int(example["label"]), content, _text(example["id"]), _text(example["class_name"])


def _split(images: Any, rows: list) -> Split:
    """Makes a split of its images and what `_describe` says of each."""
    return Split(
        images,
        labels=np.array([label for label, *_ in rows], np.int64),
        ids=[printable(id) for _, _, id, _ in rows],
        class_names={label: printable(name) for label, _, _, name in rows},
        contents=np.array([content for _, content, *_ in rows], np.int64),
    )


def _open(folder: Path, key: str) -> Split:
    """Opens a finished cache; raises ValueError, OSError, KeyError or TypeError if it is not."""
    stored = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    images = np.load(folder / "images.npy", mmap_mode="r")
    size = json.loads(key)["size"]
    if stored["key"] != key:
        raise ValueError(f"{folder} belongs to {stored['key']}")
    if images.dtype != np.uint8 or images.shape != (len(stored["examples"]), size, size, 3):
        raise ValueError(f"{folder} holds an array of the wrong shape")
    return _split(images, stored["examples"])


def _open_if_good(folder: Path, key: str) -> Split | None:
    if not folder.exists():
        return None
    try:
        return _open(folder, key)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("The cache cannot be used and is built again: %s.", error)
        return None


def _build(source: Any, folder: Path, key: str, size: int, crop: bool) -> None:
    shape = (len(source), size, size, 3)
    needed, free = int(np.prod(shape)), shutil.disk_usage(folder).free
    announcement = (
        f"the cache of {len(source):,} images of {size}x{size} pixels takes "
        f"{quantity(needed, 'B')} in {folder.parent}, where {quantity(free, 'B')} are free"
    )
    if needed * 1.01 + (16 << 20) > free:
        raise OSError(
            f"Not enough disk: {announcement}. Free some, let --config.data.dir point to a larger "
            "disk, or decode on the fly with --config.data.cache=none."
        )
    log.info("Building: %s.", announcement)

    def work(numbers: list[int]) -> tuple[np.ndarray, list[tuple]]:
        examples = source.__getitems__(numbers)
        return pixels(examples, size, crop), [_describe(example, crop) for example in examples]

    rows = []
    with (
        open(folder / "images.npy", "wb") as file,
        progress(len(source), "resizing images") as bar,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for images, described in parallel(work, _chunks(range(len(source)), CHUNK), ahead=2):
            file.write(images.data)  # which, unlike a page of a memory map, reports a full disk
            rows += described
            bar.update(len(images))
        _flush(file)
    with open(folder / "examples.json", "w", encoding="utf-8") as text:
        json.dump({"key": key, "examples": rows}, text)
        _flush(text)


def _flush(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _chunks(numbers, length: int) -> Iterator[list[int]]:
    return (list(numbers[at : at + length]) for at in range(0, len(numbers), length))


def _text(name: bytes | str) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
