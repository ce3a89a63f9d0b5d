"""Files that are never half-written."""

import contextlib
import hashlib
import io
import json
import logging
import os
import stat
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

SOFTWARE = "cgd_jax"  # in every PNG that is written, which tells it from images to search or train


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields where to write a file; it gets the name `path` when the block ends without an error.

    A reader sees the old file or the new one, never half of it, whoever else writes it too.
    """
    path = Path(path)
    part = path.with_name(f"incomplete.{uuid.uuid4().hex[:12]}{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        if error.filename == str(part):
            error.filename = str(path)  # which the user knows
        raise
    finally:
        part.unlink(missing_ok=True)


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Writes a whole file, text as UTF-8; see `replacing`."""
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, values: dict) -> None:
    """Writes a dict for people and programs to read."""
    write_atomically(path, json.dumps(values, indent=2) + "\n")


def write_picture(path: str | Path, picture: "Image.Image") -> None:
    """Writes a PNG as `write_atomically` writes text."""
    from PIL import PngImagePlugin  # not needed to read and write what else there is

    buffer, texts = io.BytesIO(), PngImagePlugin.PngInfo()
    texts.add_text("Software", SOFTWARE)
    picture.save(buffer, "PNG", pnginfo=texts)
    write_atomically(path, buffer.getvalue())


def read_regular(path: str | os.PathLike, most: int = 1 << 30, head: int | None = None) -> bytes:
    """Reads a file, or its first `head` bytes.

    Raises ValueError for what is too large and for pipes and devices, which may never end.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a file")
    if head is None and status.st_size > most:
        raise ValueError(f"larger than {most / 1e9:g} GB")
    with open(path, "rb") as file:
        return file.read(status.st_size if head is None else head)


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns a digest of arrays by name, in whatever file they came; 16 hexadecimal digits."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        found.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()[:16]


def describe_impostor(data: bytes) -> str | None:
    """Names what often lies under the name of an image, an archive or a file of weights.

    That is a Git LFS pointer or a page of HTML, by the first 512 bytes; None for neither.
    """
    if data.startswith(b"version https://git-lfs.github.com/"):
        return "a Git LFS pointer (run `git lfs pull` where the file came from)"
    if data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page (what a server sends for a login, an error or a preview)"
    return None


@contextlib.contextmanager
def warn_on_write_error(what: str) -> Iterator[None]:
    """Reports that `what` could not be written, and lets the run go on without it."""
    try:
        yield
    except (OSError, ValueError) as error:  # TensorStore's errors are ValueErrors
        text = " ".join(str(error).split())[:300]
        log.warning(
            "%s could not be written: %s. Training goes on; make room for what comes next.",
            what,
            text.rstrip("."),
        )
