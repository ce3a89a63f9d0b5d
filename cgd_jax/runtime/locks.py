"""Folders with one writer at a time."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)


@contextlib.contextmanager
def one_at_a_time(path: Path, wait: bool = True) -> Iterator[bool]:
    """Lets one process (or thread) at a time into the block; the lock file stays.

    The system drops the lock when its holder dies. It saves double work; what keeps files whole is
    `replacing`. Yields whether the file system has locks: without, everybody goes in at once.
    Raises BlockingIOError if somebody holds it and `wait` is False.
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

    Raises BlockingIOError, which says which other run is at work there.
    """
    from cgd_jax.runtime import processes

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
