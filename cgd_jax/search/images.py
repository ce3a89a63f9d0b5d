"""Images on their way into an index: listed, read, made small."""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg

from cgd_jax.data import archives, image_list
from cgd_jax.data.decode import looks_like_image
from cgd_jax.data.images import Box, cut, extent, load, naming
from cgd_jax.data.shapes import Size
from cgd_jax.runtime.errors import InputError
from cgd_jax.search.stores import Record, composed

__all__ = ["as_jpeg", "id_of", "list_images", "read", "record_of"]

THUMBNAIL = 192  # pixels, the longer side
QUALITY = 80  # of their JPEG, and of what a page shows
# What folders of splits are called, above those of classes.
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "query", "gallery"}

Listed = tuple[Record, Path]  # the path is what is read, which may be a temporary file
LeftOut = tuple[str, str]  # path, reason


def id_of(path: str) -> str:
    """Returns the id of the image with this path: 20 hexadecimal digits."""
    return hashlib.sha256(path.encode()).hexdigest()[:20]


def hash_of(data: bytes) -> str:
    """Returns the hash of a file: 32 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()[:32]


def reason_of(error: Exception) -> str:
    """Returns why a file cannot be read, in a few words."""
    return getattr(error, "strerror", None) or str(error)


def read(image: Any, size: Size, crop: Box | None = None) -> tuple[np.ndarray, dict[str, Any]]:
    """Reads an image, as `data.images.load` takes it.

    Args:
      image: to read.
      size: of the pixels that are returned.
      crop: the part of the image to read.

    Returns:
      The pixels, as `data.images.cut` makes them, and the fields of `Record` that follow from the
      content.

    Raises:
      As `data.images.read_image`; ValueError also for an empty crop.
    """
    with naming(image):
        content = load(image)
        height, width = extent(content, crop)
        pixels = cut(content, size, crop)
        small = pixels if max(pixels.shape) >= THUMBNAIL else cut(content, THUMBNAIL, crop)
    if isinstance(content, np.ndarray):
        content = f"{content.shape}".encode() + content.tobytes()
    thumbnail = as_jpeg(small, width, height)
    digest = hash_of(content)
    return pixels, {"hash": digest, "width": width, "height": height, "thumbnail": thumbnail}


def as_jpeg(pixels: np.ndarray, width: int, height: int, side: int = THUMBNAIL) -> bytes:
    """Gives an image that was resized its own shape again, as a JPEG of at most `side`."""
    scale = min(1.0, side / max(width, height))
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(small), quality=QUALITY)


def record_of(
    file: Path, path: str, label: str | None, source: str = "", modified: int | None = None
) -> Record:
    """Returns what is known of an image before its file is read.

    Args:
      file: where it is.
      path: how it is called.
      label: of its class.
      source: see `Record`.
      modified: ns; None is when the file was changed last.

    Raises:
      OSError: there is no such file.
    """
    status = file.stat()
    modified = status.st_mtime_ns if modified is None else modified
    label = composed(label)
    return Record(id_of(path), path, label, status.st_size, source=source, modified=modified)


@contextlib.contextmanager
def list_images(source: Path, scratch: Path) -> Iterator[tuple[list[Listed], list[LeftOut]]]:
    """Lists the images of a folder, an archive, or a CSV with the columns path and label.

    In folders and archives the label is the name of the first folder below the source; of
    the second, where the first one is called train, test, val, query or gallery. The path of an
    archive's member begins with the archive's, and it was changed when the archive was.

    Args:
      source: what to list.
      scratch: where to unpack an archive for as long as the block runs.

    Yields:
      The images, and what was left out.

    Raises:
      InputError: there is no such source.
      ValueError: an archive or a CSV is damaged.
    """
    if not source.exists():
        raise InputError(
            f"--images={source}: there is no such folder, archive or CSV. The images that an index "
            f"has of it stay there."
        )
    if source.suffix.lower() == ".csv" and source.is_file():
        rows = [(row.path, str(row.path), row.label) for row in image_list.read(source)]
        yield _list_rows(rows, str(source))
    elif source.is_dir() or archives.is_archive(source):
        modified = None if source.is_dir() else source.stat().st_mtime_ns
        with archives.unpacked(source, scratch) as folder:
            inside = [(file, file.relative_to(folder)) for file in archives.files_below(folder)]
            named = [(file, str(source / path), _label_of(path)) for file, path in inside]
            yield _list_rows(named, str(source), modified)
    else:
        raise InputError(
            f"--images={source} is neither a folder, nor a CSV, nor an archive "
            f"({', '.join(archives.ARCHIVE_ENDINGS)})."
        )


def _label_of(path: Path) -> str | None:
    folders = path.parts[:-1]
    if len(folders) > 1 and folders[0].lower() in SPLITS:
        folders = folders[1:]
    return folders[0] if folders else None


def _list_rows(
    rows: Iterable[tuple[Path, str, str | None]], source: str, modified: int | None = None
) -> tuple[list[Listed], list[LeftOut]]:
    """Returns the images among rows of a file, its name and a label; and what is none."""
    found, left_out = {}, []
    for file, path, label in rows:
        try:
            f"{path}{label}".encode()
            if looks_like_image(file):
                record = record_of(file, path, label, source, modified)
                found[record.id] = record, file
                continue
            reason = "no image by its name" if file.exists() else "there is no such file"
        except UnicodeEncodeError:
            path = path.encode(errors="backslashreplace").decode()
            reason = "its name is not valid UTF-8; rename it"
        except OSError as error:
            reason = reason_of(error)
        left_out.append((path, reason))
    return list(found.values()), left_out
