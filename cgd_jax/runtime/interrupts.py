"""Ctrl-C and SIGTERM, taken where nothing is lost."""

import contextlib
import logging
import signal

# sysexits.h: a temporary failure. Schedulers start the same command once more.
EXIT_TEMPFAIL = 75

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

log = logging.getLogger(__name__)


class Stopped(Exception):
    """SIGINT or SIGTERM came where work may be dropped: see `stop_at_once`."""


@contextlib.contextmanager
def stop_signals():
    """Collects SIGINT and SIGTERM, so that a loop can end where nothing is lost.

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
    """Within `stop_signals`, around long work that can be done once more: drops it.

    Args:
      received: what `stop_signals` yields; a signal is added to it here too.

    Raises:
      Stopped: there is or comes a signal.
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
