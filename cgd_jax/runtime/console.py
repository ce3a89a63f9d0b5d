"""What a terminal shows: messages, log lines, progress bars."""

import contextlib
import logging
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)


def say(text: str) -> None:
    """Prints without tearing a progress bar apart; of several processes only the first does.

    Characters that the terminal does not have, such as bytes of file names, are escaped.
    """
    if "jax" in sys.modules:  # else there is one process
        from cgd_jax.runtime import processes

        if not processes.is_first():
            return
    encoding = sys.stdout.encoding or "utf-8"
    tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding))


def columns() -> int:
    """Returns how many characters a line of the terminal has; 80 where there is none."""
    return shutil.get_terminal_size().columns


def show_log() -> None:
    """Prints what the modules of this package log: what is built, skipped or repaired."""

    class Say(logging.Handler):
        def emit(self, record):
            say(record.getMessage())

    logger = logging.getLogger("cgd_jax")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [Say()]


class _LogLines:
    """A file for tqdm that makes a log line of every state of the bar."""

    def write(self, text: str) -> None:
        if text := text.strip():
            log.info(text)

    def flush(self) -> None:
        pass


@contextlib.contextmanager
def progress(total: int, what: str, unit: str = "image", log_every: float = 10.0) -> Iterator[tqdm]:
    """Yields a progress bar; where there is no terminal, it is a log line now and then.

    Args:
      total: number of units of work; 0 if it is not known.
      what: is being done, such as "resizing images".
      unit: name of one unit; "B" counts bytes in kB, MB and GB.
      log_every: seconds between two log lines.
    """
    options: dict[str, Any]
    options = {"total": total or None, "desc": what, "unit": unit, "unit_scale": unit == "B"}
    if sys.stderr.isatty():
        options["smoothing"] = 0.1
    else:
        options |= {
            "file": _LogLines(),
            "mininterval": log_every,
            "miniters": 1,
            "delay": 1e-9,  # no line before the first unit is done
            "bar_format": "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {rate_fmt}",
        }
    with tqdm(**options) as bar:
        yield bar
