"""What a run survives: being told to stop, a second start in its folder, a full disk."""

import contextlib
import logging
import os
import signal
import socket
from pathlib import Path

from cgd_jax import building, processes

# What sysexits.h calls a temporary failure: schedulers start the same command once more.
REQUEUE = 75

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


@contextlib.contextmanager
def only_run_in(workdir: str):
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
            stack.enter_context(building.one_at_a_time(lock, wait=False))
        except BlockingIOError:
            raise BlockingIOError(
                f"{workdir} belongs to a run that is still at work ({lock.read_text().strip()}). "
                f"Wait for it, stop it, or choose another folder with --workdir=."
            ) from None
        lock.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield


@contextlib.contextmanager
def reported(what: str):
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
