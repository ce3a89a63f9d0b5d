"""Pictures on their way into an index: listed, read, made small."""

import contextlib
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from cgd_jax.data import archives, image_list
from cgd_jax.data.decode import decode, dimensions, looks_like_image, resize, to_rgb

__all__ = ["File", "Picture", "id_of", "list_files", "read", "read_image"]

THUMBNAIL = 192  # pixels, the longer side
QUALITY = 80  # of the thumbnails' JPEG
# (x0, y0, x1, y1) in pixels of the image as displayed.
Box = tuple[float, float, float, float]
# What folders of splits are called, above those of classes.
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "query", "gallery"}


class File(NamedTuple):
    """A file to index."""

    id: str
    path: str  # as it is shown: that of a member of an archive begins with the archive's
    label: str | None
    file: Path  # what is read
    size: int  # bytes
    modified: int  # ns; of a member of an archive, when the archive was


class Row(NamedTuple):
    """A file that a source names, photograph or not."""

    file: Path
    path: str
    label: str | None


class Picture(NamedTuple):
    """A picture that was read."""

    pixels: Any  # [side, side, 3] uint8, what the network gets; None once it has been embedded
    thumbnail: bytes  # JPEG
    hash: str  # of the file
    width: int  # pixels, as displayed
    height: int


def id_of(path: str) -> str:
    """Returns the id of the picture with this path: 20 hexadecimal digits."""
    return hashlib.sha256(path.encode()).hexdigest()[:20]


def read(data: bytes, side: int, crop: Box | None = None) -> Picture:
    """Reads the bytes of an image file.

    Args:
      data: the file.
      side: of `pixels`.
      crop: the part of the image to read.

    Raises:
      ValueError: not a readable image; the message is the reason in a few words.
    """
    height, width = dimensions(data)
    pixels = decode(data, crop, side)
    small = pixels if side >= THUMBNAIL else decode(data, crop, THUMBNAIL)
    if crop is not None:
        width, height = (
            math.ceil(min(crop[2], width) - max(crop[0], 0)),
            math.ceil(min(crop[3], height) - max(crop[1], 0)),
        )
    return Picture(pixels, _thumbnail(small, width, height), hash_of(data), width, height)


def hash_of(data: bytes) -> str:
    """Returns the hash of a file: 32 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()[:32]


def read_image(image: Image.Image | np.ndarray, side: int) -> Picture:
    """Reads what is in memory: an image of Pillow, or an array [H, W, 3] uint8, as `read` does.

    Raises:
      ValueError: an array of another shape or type.
    """
    if isinstance(image, Image.Image):
        image = to_rgb(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"an image is [H, W, 3] uint8, not {list(image.shape)} {image.dtype}.")
    height, width = image.shape[:2]
    digest = hash_of(f"{image.shape}".encode() + image.tobytes())
    thumbnail = _thumbnail(resize(image, THUMBNAIL), width, height)
    return Picture(resize(image, side), thumbnail, digest, width, height)


def _thumbnail(square: np.ndarray, width: int, height: int) -> bytes:
    """Gives an image that was resized to a square its shape again, as a small JPEG."""
    longest = max(width, height)
    scale = min(THUMBNAIL, longest) / longest
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    small = cv2.resize(square, size, interpolation=cv2.INTER_AREA)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(small), quality=QUALITY)


@contextlib.contextmanager
def list_files(source: Path, scratch: Path) -> Iterator[tuple[list[File], list[tuple[str, str]]]]:
    """Lists the photographs of a folder, an archive, or a CSV with the columns path and label.

    In folders and archives the label is the name of the first folder below the source; of
    the second, where the first one is called train, test, val, query or gallery.

    Args:
      source: what to list.
      scratch: where to unpack an archive for as long as the block runs.

    Yields:
      The files, and (path, reason) of those that were left out.

    Raises:
      FileNotFoundError: there is no such source.
      ValueError: an archive or a CSV is damaged.
    """
    if not source.exists():
        raise FileNotFoundError(
            f"--images={source}: there is no such folder, archive or CSV. Pictures that an index "
            f"has of it stay there."
        )
    if source.suffix.lower() == ".csv" and source.is_file():
        rows = [Row(row.path, str(row.path), row.label) for row in image_list.read(source)]
        yield _described(rows, None)
    elif source.is_dir():
        yield _described(_below(source, source), None)
    elif archives.is_archive(source):
        with archives.unpacked(source, scratch) as folder:
            yield _described(_below(folder, source), source.stat().st_mtime_ns)
    else:
        raise ValueError(
            f"--images={source} is neither a folder, nor a CSV, nor an archive "
            f"({', '.join(archives.ARCHIVE_ENDINGS)})."
        )


def _below(folder: Path, shown: Path) -> list[Row]:
    rows = []
    for file in archives.files_below(folder):
        *folders, name = file.relative_to(folder).parts
        if len(folders) > 1 and folders[0].lower() in SPLITS:
            del folders[0]
        path = shown / file.relative_to(folder)
        rows.append(Row(file, str(path), folders[0] if folders else None))
    return rows


def _described(rows: list[Row], modified: int | None) -> tuple[list[File], list[tuple[str, str]]]:
    found, left_out = {}, []
    for file, path, label in rows:
        try:
            path.encode()
            (label or "").encode()
        except UnicodeEncodeError:
            shown = path.encode(errors="backslashreplace").decode()
            left_out.append((shown, "its name is not valid UTF-8; rename it"))
            continue
        if not looks_like_image(file):
            reason = "no photograph by its name" if file.exists() else "there is no such file"
            left_out.append((path, reason))
            continue
        try:
            status = file.stat()
        except OSError as error:
            left_out.append((path, error.strerror or str(error)))
            continue
        id = id_of(path)
        when = status.st_mtime_ns if modified is None else modified
        found[id] = File(id, path, label, file, status.st_size, when)
    return list(found.values()), left_out
