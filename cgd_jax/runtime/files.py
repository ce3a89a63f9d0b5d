"""Files that are never half-written, and folders with one writer at a time."""

import contextlib
import io
import json
import logging
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from PIL import Image

from cgd_jax.runtime import processes

log = logging.getLogger(__name__)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields where to write a file; it gets the name `path` when the block ends without an error.

    A reader sees the old file or the new one, never half of it, whoever else writes it too.
    The path to write to lies in the same folder and has the same suffix.
    """
    path = Path(path)
    part = path.with_name(f"incomplete.{uuid.uuid4().hex[:12]}{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Writes a whole file, text as UTF-8; see `replacing`."""
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, values: dict) -> None:
    """Writes a dict for people and programs to read."""
    write_atomically(path, json.dumps(values, indent=2) + "\n")


def write_picture(path: str | Path, picture: Image.Image) -> None:
    """Writes a PNG as `write_atomically` writes text."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def describe_impostor(data: bytes) -> str | None:
    """Names what often lies under the name of a picture, an archive or a file of weights.

    Args:
      data: the file, or its first 512 bytes.

    Returns:
      "a Git LFS pointer (...)" or "an HTML page (...)", with what to do; None for neither.
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


@contextlib.contextmanager
def one_at_a_time(path: Path, wait: bool = True) -> Iterator[bool]:
    """Lets one process (or thread) at a time into the block.

    The operating system drops the lock when its holder dies, so no folder stays locked. The
    lock saves double work; what keeps files whole is `replacing`.

    Args:
      path: of the lock file, which is made if it is not there and stays.
      wait: whether to wait for the holder.

    Yields:
      Whether the file system has locks. Without them everybody goes in at once.

    Raises:
      BlockingIOError: somebody else holds the lock and `wait` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        held, alone = _acquire(path, wait), True
    except OSError as error:
        # An error of opening the file names it; one of locking it does not.
        if isinstance(error, BlockingIOError) or error.filename is not None:
            raise
        held, alone = contextlib.nullcontext(), False
    with held:
        yield alone


def _acquire(path: Path, wait: bool) -> contextlib.AbstractContextManager:
    # The library's way out where there are no locks is a file that a killed process leaves.
    lock = FileLock(path, fallback_to_soft=False)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        if not wait:
            raise BlockingIOError(f"{path} is locked by another process.") from None
    log.info("Another run holds %s; waiting for it to finish.", path)
    return lock.acquire()


@contextlib.contextmanager
def one_run_in(workdir: str) -> Iterator[None]:
    """Keeps a second run out of a work folder, which is made if it is not there.

    Raises:
      BlockingIOError: another run is at work there; it says which.
    """
    if not processes.is_first():
        yield
        return
    lock = Path(workdir, ".lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(one_at_a_time(lock, wait=False))
        except BlockingIOError:
            raise BlockingIOError(
                f"{workdir} belongs to a run that is still at work ({lock.read_text().strip()}). "
                f"Wait for it, stop it, or choose another folder with --workdir=."
            ) from None
        lock.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
