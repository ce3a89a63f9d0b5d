"""What building a data set and building a cache have in common.

Threads are enough for both: the decoders release Python's lock, so all cores work.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Not a POSIX system.
    fcntl = None

log = logging.getLogger(__name__)

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def build_once(builder, build: Callable[[], None]) -> None:
    """Build a TFDS data set unless it is on disk; of several processes at once, one does.

    Args:
        builder: of the data set.
        build: its way to build it, `tfds.core.DatasetBuilder.download_and_prepare`.
    """
    folder = Path(builder.data_dir).parent
    if not os.path.exists(builder.data_dir):  # Else it may well be read-only.
        with one_at_a_time(folder / "lock") as alone:
            if alone and not os.path.exists(builder.data_dir):
                for remains in folder.glob("incomplete.*"):  # of a run that was killed
                    shutil.rmtree(remains, ignore_errors=True)
            build()
    if not builder.info.splits:  # Another process built it since this object was made.
        builder.info.read_from_directory(builder.data_dir)


def parallel(function: Callable[[Any], Any], items: Iterable, ahead: int = 4) -> Iterator:
    """Yield ``function(item)`` for each item, in order, computed by one thread per core.

    At most ``ahead`` results per core wait to be taken, so memory does not grow with the
    number of items.
    """
    with ThreadPoolExecutor(CORES) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead * CORES:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextlib.contextmanager
def progress(total: int, what: str, unit: str = "image", log_every: float = 10.0):
    """Yield a function to call with the number of finished units.

    A bar on a terminal; elsewhere a log line every ``log_every`` seconds.
    """
    if sys.stderr.isatty():
        scale = unit == "B"
        with tqdm(total=total, desc=what, unit=unit, unit_scale=scale, smoothing=0.1) as bar:
            yield bar.update
        return
    start = last = time.monotonic()
    done = 0

    def update(count: int = 1) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= log_every:
            last = now
            rate = done / (now - start)
            left = f"{(total - done) / rate:.0f} s left" if total and rate else ""
            log.info("%s: %d of %d, %.0f %s/s %s", what, done, total, rate, unit, left)

    yield update
    log.info("%s: %d in %.1f s", what, done, time.monotonic() - start)
