"""Files that are never half-written, and folders with one writer at a time."""

import contextlib
import io
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cgd_jax.runtime import processes

try:
    import fcntl
except ImportError:  # Not a POSIX system.
    fcntl = None

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Writes a file under another name first: a reader never sees half of it."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, values: dict) -> None:
    """Writes a dict for people and programs to read."""
    write_atomically(path, json.dumps(values, indent=2) + "\n")


def write_picture(path: str | Path, picture: "Image.Image") -> None:
    """Writes a PNG as `write_atomically` writes text."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


@contextlib.contextmanager
def warn_on_write_error(what: str):
    """What cannot be written is no reason to lose the run as well: says so and goes on."""
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
def one_at_a_time(lock: Path, wait: bool = True) -> Iterator[bool]:
    """Let one process at a time into the block; the others wait, or get BlockingIOError.

    Yields whether that works.

    The operating system drops the lock when its holder dies, so nothing can be left locked.
    It saves double work but is not what keeps files whole (atomic renames are): on a file
    system without locks everybody goes in at once and is told so by False.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a") as file:
        alone = fcntl is not None
        if alone:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                log.info("Another run holds %s; waiting for it to finish.", lock)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                alone = False
        yield alone


@contextlib.contextmanager
def one_run_in(workdir: str):
    """Keeps a second run out of a work folder; the operating system ends that with the process.

    Args:
      workdir: is made if it is not there.

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
