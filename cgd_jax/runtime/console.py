"""What a terminal shows: messages, log lines, progress bars."""

import contextlib
import logging
import sys
import time

from tqdm import tqdm

from cgd_jax.runtime import processes

log = logging.getLogger(__name__)


def say(text: str) -> None:
    """Prints without tearing a progress bar apart; of several processes only the first does."""
    if processes.is_first():
        tqdm.write(text)


def show_log() -> None:
    """Prints what the modules of this package log: what is built, skipped or repaired."""

    class Say(logging.Handler):
        def emit(self, record):
            say(record.getMessage())

    logger = logging.getLogger("cgd_jax")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [Say()]


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
