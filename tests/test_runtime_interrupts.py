"""Signals: which are collected, and a terminal that goes away."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cgd_jax.runtime import interrupts

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_collected(number, monkeypatch):
    monkeypatch.setattr(interrupts, "_let_go_of_terminal", lambda: None)
    before = signal.getsignal(number)
    with interrupts.stop_signals() as received:
        signal.raise_signal(number)
        assert received == [number]
        with pytest.raises(interrupts.Stopped), interrupts.stop_at_once(received):
            raise AssertionError("a signal was there already")
    assert signal.getsignal(number) == before


def test_nohup_is_obeyed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts.stop_signals() as received:
            signal.raise_signal(signal.SIGHUP)
        assert received == [] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_output_to_a_terminal_that_is_gone_goes_nowhere():
    code = (
        "import os, signal\n"
        "from cgd_jax.runtime import interrupts\n"
        "with interrupts.stop_signals() as received:\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    print('nobody hears this', flush=True)\n"
        "raise SystemExit(received != [signal.SIGHUP])\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=writing, stderr=writing, timeout=60
    )
    os.close(writing)
    assert done.returncode == 0
