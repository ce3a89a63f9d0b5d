"""SIGINT (Ctrl-C), SIGTERM and SIGHUP (a closed terminal), handled where no work is lost."""

import contextlib
import logging
import os
import signal
import stat

# sysexits.h: a temporary failure. Schedulers start the same command once more.
EXIT_TEMPFAIL = 75

_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
_SIGNALS = [number for number in (signal.SIGINT, signal.SIGTERM, _HANGUP) if number]

log = logging.getLogger(__name__)


class Stopped(Exception):
    """A signal arrived within `stop_at_once`."""


@contextlib.contextmanager
def stop_signals():
    """Yields a list that gets the number of a signal that arrives, so that a loop can end.

    A second Ctrl-C is not caught.
    """
    received = []

    def handle(number, frame):
        _receive(number, received)

    with _handled_by(handle):
        yield received


@contextlib.contextmanager
def stop_at_once(received: list[int]):
    """Raises Stopped in long work that can be repeated, once a signal is there or comes.

    `received` is what `stop_signals` yields, within which this is used.
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
    with contextlib.suppress(OSError):  # of a terminal that is gone
        log.warning(
            "\n%s: finishing this step and saving. Ctrl-C again quits at once and loses what was "
            "done since the last checkpoint.",
            signal.Signals(number).name,
        )
    if number == _HANGUP:
        _let_go_of_terminal()


def _let_go_of_terminal() -> None:
    """Sends to nowhere what would be written to a terminal or a pipe, which would fail."""
    for output in (1, 2):
        if not stat.S_ISREG(os.fstat(output).st_mode):
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)


@contextlib.contextmanager
def _handled_by(handle):
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    if before.get(_HANGUP) is signal.SIG_IGN:
        del before[_HANGUP]  # as nohup wants it
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
