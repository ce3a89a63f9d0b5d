"""What a terminal shows: messages, log lines, progress bars."""

import contextlib
import logging
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterator
from typing import Any, NoReturn

from tqdm import tqdm

logger = logging.getLogger(__name__)


# But line breaks and tabs.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def escaped(text: str) -> str:
    """Writes control characters, which a terminal obeys, as Python does; names may hold them."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def log(text: str) -> None:
    """Prints without tearing a progress bar apart; of several processes only the first does.

    Characters that the terminal does not have, such as bytes of file names, are escaped.
    """
    if "jax" in sys.modules:  # else there is one process
        from cgd_jax.runtime import processes

        if not processes.is_first():
            return
    encoding = sys.stdout.encoding or "utf-8"
    tqdm.write(escaped(text).encode(encoding, "backslashreplace").decode(encoding))


def end(error: object) -> NoReturn:
    """Ends the program with a paragraph that says what is wrong, whatever names it holds."""
    sys.exit(f"error: {escaped(str(error))}")


def duration(seconds: float) -> str:
    """Returns a time as people say it: "0.4 s", "12 s", "2 min 43 s", "3 h 05 min".

    >>> duration(0.41), duration(163.4), duration(11_100)
    ('0.4 s', '2 min 43 s', '3 h 05 min')
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left:02} min" if hours else f"{minutes} min {rest:02} s"


def quantity(number: float, unit: str = "") -> str:
    """Returns three digits of a large number, with the prefix of a thousand, a million, ...

    >>> quantity(4_089_184_256), quantity(1_130_000, "B"), quantity(252), quantity(999_999, "B")
    ('4.09 G', '1.13 MB', '252', '1 MB')
    """
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5 or prefix == "T":
            break
        number /= 1000
    return f"{number:.3g} {prefix}{unit}".strip()


def columns() -> int:
    """Returns how many characters a line of the terminal has; 80 where there is none."""
    return shutil.get_terminal_size().columns


def bar_width() -> dict[str, Any]:
    """Returns tqdm's options for the width of a bar, also where a terminal reports 0 columns."""
    try:
        known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # no terminal
        known = True
    # Such a terminal has no rows either, and tqdm would hide what stands below the last one.
    return {"dynamic_ncols": True} if known else {"ncols": columns(), "nrows": 24}


def fold(text: str) -> str:
    """Breaks lines that are longer than those of the terminal, at spaces."""
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(line, columns(), **options) for line in text.splitlines())


def show_log() -> None:
    """Prints what the modules of this package log: what is built, skipped or repaired."""

    class Console(logging.Handler):
        def emit(self, record):
            text = record.getMessage()
            log(fold(text) if sys.stdout.isatty() else text)

    logger = logging.getLogger("cgd_jax")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [Console()]


class _LogLines:
    """A file for tqdm that makes a log line of every state of the bar."""

    def write(self, text: str) -> None:
        if text := text.strip():
            logger.info(text)

    def flush(self) -> None:
        pass


@contextlib.contextmanager
def progress(
    total: int, what: str, unit: str = "image", log_every: float | None = 10.0
) -> Iterator[tqdm]:
    """Yields a progress bar, which goes when it is done; without a terminal, log lines.

    `total` is 0 if it is not known; the unit "B" counts bytes in kB, MB and GB; `log_every` is in
    seconds, None for no lines.
    """
    options: dict[str, Any] = {"total": total or None, "desc": escaped(what)}
    options |= {"unit": unit, "unit_scale": True} if unit == "B" else {"unit": f" {unit}"}
    if sys.stderr.isatty() or log_every is None:
        # "disable": where there is no terminal.
        options |= {"disable": None, "leave": False, "smoothing": 0.1, **bar_width()}
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


def counted(things: Collection, what: str, unit: str) -> Iterator:
    """Yields things one by one, with the progress bar of `progress` on a terminal."""
    with progress(len(things), what, unit, log_every=None) as bar:
        for thing in things:
            yield thing
            bar.update()
