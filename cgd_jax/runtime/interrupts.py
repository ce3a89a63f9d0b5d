"""SIGINT (Ctrl-C) and SIGTERM, handled where no work is lost."""

import contextlib
import logging
import signal

# sysexits.h: a temporary failure. Schedulers start the same command once more.
EXIT_TEMPFAIL = 75

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

log = logging.getLogger(__name__)


class Stopped(Exception):
    """SIGINT or SIGTERM arrived within `stop_at_once`."""


@contextlib.contextmanager
def stop_signals():
    """Collects SIGINT and SIGTERM, so that a loop can end between two steps.

    Yields:
      A list, empty until a signal arrives; then it holds its number. A second
      Ctrl-C is not caught.
    """
    received = []

    def handle(number, frame):
        _receive(number, received)

    with _handled_by(handle):
        yield received


@contextlib.contextmanager
def stop_at_once(received: list[int]):
    """Drops long work that can be repeated when a signal comes; used within `stop_signals`.

    Args:
      received: what `stop_signals` yields; the signal is added to it.

    Raises:
      Stopped: A signal has arrived, or arrives.
    """

    def handle(number, frame):
        _receive(number, received)
        raise Stopped

    with _handled_by(handle):
        if received:
            raise Stopped
        yield


def _receive(number: int, received: list[int]) -> None:
    received.append(number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log.warning(
        "\n%s: finishing this step and saving. Ctrl-C again quits at once and loses what was done "
        "since the last checkpoint.",
        signal.Signals(number).name,
    )


@contextlib.contextmanager
def _handled_by(handle):
    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
