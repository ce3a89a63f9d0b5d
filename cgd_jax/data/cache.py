"""Images of one split as an array of equal squares, from a file or decoded as asked for.

Decoding a photo takes milliseconds, copying 252×252 finished pixels microseconds. So the
deterministic part of the preparation (decode, crop to the box, resize) happens once, into a
memory-mapped file that every run on the machine shares: the operating system keeps in
memory what is used, and gives it back when somebody needs the room.

A source is a TFDS data source made with `decoders={"image": tfds.decode.SkipDecoding()}`: it has
a length, and `__getitems__` of a list of numbers gives dicts of `image` (encoded bytes), `label`,
`class_name`, `id` and perhaps `bbox`.
"""

import contextlib
import gzip
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cgd_jax.data.dataset import Images, Split, printable
from cgd_jax.data.decode import decode
from cgd_jax.data.images import extent
from cgd_jax.data.shapes import Shape, as_shape, nearest
from cgd_jax.runtime.console import progress, quantity
from cgd_jax.runtime.locks import one_at_a_time
from cgd_jax.runtime.threads import parallel

log = logging.getLogger(__name__)

# Raised whenever decode.py would give other pixels for the same bytes.
FORMAT = 2
IMAGES = "images.uint8"  # their pixels, and nothing else
EXAMPLES = "examples.json.gz"  # the key, and of every example what `_describe` says; its checksum
CHUNK = 16  # examples that a thread takes at once


def cached(
    examples: Images,
    folder: str | os.PathLike,
    key: dict[str, Any],
    size: int,
    most: float = math.inf,
) -> Split:
    """Opens the cache of `encoded` examples, building it first unless it is there and whole.

    `key` tells the examples from any others; size, number of images and the way of resizing are
    added. Of images that take more than `most` bytes some are kept, evenly spread, and the others
    are decoded when asked for. Processes that ask at once build it once, and nothing has its final
    name before it is whole. Raises OSError where the disk is too small.
    """
    key = {**key, "size": size, "images": len(examples), "format": FORMAT}
    kept = int(min(len(examples), max(1, most / (size * size * 3))))
    if kept < len(examples):
        key["kept"] = kept
    text = json.dumps(key, sort_keys=True)
    target = Path(folder, f"{size}-{hashlib.sha256(text.encode()).hexdigest()[:16]}")
    with contextlib.suppress(Exception):  # damaged files raise nearly anything
        return _open(target, examples, size)
    with one_at_a_time(target.with_name(f"{target.name}.lock")) as alone:
        try:
            return _open(target, examples, size)  # Another process built it meanwhile.
        except Exception as error:
            if (target / EXAMPLES).exists():  # unlike in those of older versions
                log.warning("The cache %s cannot be used and is built again: %s.", target, error)
            shutil.rmtree(target, ignore_errors=True)
        incomplete = f"incomplete.{target.name}."
        if alone:
            for remains in target.parent.glob(f"{incomplete}*"):  # of a killed process
                shutil.rmtree(remains, ignore_errors=True)
        part = target.with_name(incomplete + uuid.uuid4().hex[:8])
        part.mkdir()
        try:
            _build(examples, part, text, size, kept)
            with contextlib.suppress(OSError):  # Without locks another may have been faster.
                os.rename(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return _open(target, examples, size)


def decoded(examples: Images, size: int) -> Split:
    """Opens a split whose images are decoded when asked for; for sets larger than the disk.

    All `encoded` examples are read once, for their labels.
    """
    rows: list[tuple] = []
    with progress(len(examples), "reading labels") as bar:
        for numbers in _chunks(range(len(examples)), CHUNK):
            rows += map(_describe, examples[numbers])
            bar.update(len(numbers))
    return _split(resized(examples, size), rows)


def resized(examples: Images, size: int) -> Images:
    """Opens the images of `encoded` examples, which are decoded when asked for."""
    return Images(_decoder(examples, size), np.arange(len(examples)), size)


def encoded(source: Any, crop: bool = True) -> Images:
    """Opens the examples of a split themselves, without their boxes unless they are cut out."""

    def read(numbers: np.ndarray) -> list[dict[str, Any]]:
        examples = source.__getitems__(numbers.tolist())
        return examples if crop else [{**example, "bbox": None} for example in examples]

    return Images(read, np.arange(len(source)), 0)


def by_shape(examples: Images, shapes: tuple[Shape, ...]) -> list[tuple[np.ndarray, Images]]:
    """Sorts examples by the nearest shape: rows [n] and images [n, H, W, 3] of each."""

    def work(number: int) -> Shape:
        example = examples[number]
        return nearest(shapes, *extent(example["image"], example.get("bbox")))

    rows: dict[Shape, list[int]] = {}
    for number, shape in enumerate(parallel(work, range(len(examples)))):
        rows.setdefault(shape, []).append(number)
    return [
        (np.array(some), Images(_decoder(examples, shape), np.array(some), shape))
        for shape, some in sorted(rows.items())
    ]


def _decoder(examples: Images, size: int | Shape) -> Callable[[np.ndarray], np.ndarray]:
    """Returns what decodes examples with some numbers [B] to [B, H, W, 3], on all cores."""

    def work(numbers: list[int]) -> np.ndarray:
        return pixels(examples[numbers], size)

    def read(numbers: np.ndarray) -> np.ndarray:
        none = np.empty((0, *as_shape(size), 3), np.uint8)
        return np.concatenate([none, *parallel(work, _chunks(numbers.tolist(), 4))])

    return read


def _checked(
    images: np.memmap,
    places: np.ndarray,
    checksums: np.ndarray,
    decode: Callable[[np.ndarray], np.ndarray],
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns what copies images, checks each when it is first read, and decodes damaged ones.

    An image's place among `images` is -1 if it is not kept there, and decoded.
    """
    good = np.zeros(len(images), bool)

    def read(numbers: np.ndarray) -> np.ndarray:
        at = places[numbers]
        copies = np.asarray(images[at])
        for row in np.flatnonzero((at >= 0) & ~good[at]):
            good[at[row]] = zlib.crc32(copies[row]) == checksums[at[row]]
        if damaged := np.sum((at >= 0) & ~good[at]):
            log.warning(
                "%d images in the cache %s are damaged and were decoded anew. Delete the cache, "
                "and the next run builds it again.",
                damaged,
                Path(str(images.filename)).parent,
            )
        rest = np.flatnonzero((at < 0) | ~good[at])
        if rest.size:
            copies[rest] = decode(numbers[rest])
        return copies

    return read


def pixels(examples: list[dict[str, Any]], size: int | Shape) -> np.ndarray:
    """Decodes examples to uint8 [B, H, W, 3], cropped to their boxes if they have any."""
    images = np.empty((len(examples), *as_shape(size), 3), np.uint8)
    for image, example in zip(images, examples, strict=True):
        try:
            image[:] = decode(example["image"], example.get("bbox"), size)
        except ValueError as error:
            raise ValueError(f"Image {_text(example['id'])}: {error}.") from error
    return images


def _describe(example: dict[str, Any]) -> tuple[int, int, str, str]:
    """Returns label, content, id and class name of an example.

    Its content is a number of 64 bits, equal for two examples with the same file and box.
    """
    digest = hashlib.blake2b(example["image"], digest_size=8)
    if example.get("bbox") is not None:
        digest.update(np.asarray(example["bbox"], "<f4").tobytes())
    content = int.from_bytes(digest.digest(), "little", signed=True)
    return int(example["label"]), content, _text(example["id"]), _text(example["class_name"])


def _split(images: Any, rows: list) -> Split:
    """Makes a split of its images and what `_describe` says of each."""
    return Split(
        images,
        labels=np.array([row[0] for row in rows], np.int64),
        ids=[printable(row[2]) for row in rows],
        class_names={row[0]: printable(row[3]) for row in rows},
        contents=np.array([row[1] for row in rows], np.int64),
    )


def _open(folder: Path, examples: Images, size: int) -> Split:
    """Opens a finished cache; raises whatever if it is not."""
    rows = json.loads(gzip.decompress((folder / EXAMPLES).read_bytes()))["examples"]
    kept = [number for number, row in enumerate(rows) if row[4] is not None]
    pixels = np.memmap(folder / IMAGES, np.uint8, "r", shape=(len(kept), size, size, 3))
    places = np.full(len(rows), -1)
    places[kept] = np.arange(len(kept))
    checksums = np.array([rows[number][4] for number in kept])
    read = _checked(pixels, places, checksums, _decoder(examples, size))
    return _split(Images(read, np.arange(len(rows)), size), rows)


def _build(examples: Images, folder: Path, key: str, size: int, kept: int) -> None:
    needed, free = kept * size * size * 3, shutil.disk_usage(folder).free
    announcement = (
        f"the cache of {kept:,} images of {size}x{size} pixels takes "
        f"{quantity(needed, 'B')} in {folder.parent}, where {quantity(free, 'B')} are free"
    )
    if needed * 1.01 + (16 << 20) > free:
        raise OSError(
            f"Not enough disk: {announcement}. Free some, let --config.data.dir point to a larger "
            "disk, or decode on the fly with --config.data.cache=none."
        )
    log.info("Building: %s.", announcement)
    rows: list[tuple] = []
    chosen = np.arange(kept) * len(examples) // kept  # so that batches have equal shares

    def work(numbers: list[int]) -> tuple[np.ndarray, list[tuple]]:
        some = examples[numbers]
        is_kept = np.isin(numbers, chosen)
        images = pixels(list(itertools.compress(some, is_kept)), size)
        checksums = np.full(len(some), None)
        checksums[is_kept] = [zlib.crc32(image) for image in images]
        described = zip(map(_describe, some), checksums, strict=True)
        return images, [(*row, checksum) for row, checksum in described]

    def resized() -> Iterator[memoryview]:
        with progress(len(examples), "resizing images") as bar:
            for images, found in parallel(work, _chunks(range(len(examples)), CHUNK), ahead=2):
                rows.extend(found)
                bar.update(len(images))
                yield images.data

    _write(folder / IMAGES, resized())
    content = json.dumps({"key": key, "examples": rows}).encode()
    _write(folder / EXAMPLES, [gzip.compress(content, 1)])


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    with open(path, "wb") as file:  # which, unlike a page of a memory map, reports a full disk
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())


def _chunks(numbers, length: int) -> Iterator[list[int]]:
    return (list(numbers[at : at + length]) for at in range(0, len(numbers), length))


def _text(name: bytes | str) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
