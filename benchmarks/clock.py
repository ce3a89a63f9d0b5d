"""Contenders in processes of their own, on the same cores, in turns.

A process that waits for its turn is stopped, threads and all: those of OpenMP spin behind
their work and would take the cores from whoever comes next. Time is taken inside of the process.
"""

import importlib.metadata
import multiprocessing
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PACKAGES = ("jax", "jaxlib", "numpy", "torch", "faiss-cpu", "pytorch-metric-learning", "pillow")


class Timed(NamedTuple):
    """What a contender's process measured.

    Attributes:
      seconds: of each call.
      value: what the last call returned.
    """

    seconds: list[float]
    value: Any

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Largest minus smallest time, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def compare(
    contenders: dict[str, Callable[[], Callable[[], Any]]], rounds: int, warm: int = 2
) -> dict[str, Timed]:
    """Times contenders, each in a process forked from this one, which must not have used JAX.

    They prepare themselves one after the other; on a machine of many cores all but the first at
    the same time.

    Args:
      contenders: name → a function that imports and prepares what it needs and returns what is
        timed. That returns something small.
      rounds: timed calls of each, one after the other.
      warm: calls before, which are not timed.

    Returns:
      name → `Timed`, without the contenders that fail, of which a line is printed.
    """
    fork = multiprocessing.get_context("fork")
    running, found = {}, {}
    try:
        # The first has the machine for itself, as it may choose its programs by what they take.
        first, *others = contenders
        together = len(os.sched_getaffinity(0)) >= 4 * len(others)
        for names in ([first], others) if together else ([name] for name in contenders):
            for name in names:
                ours, theirs = fork.Pipe()
                process = fork.Process(target=_serve, args=(theirs, contenders[name], warm))
                process.start()
                theirs.close()
                running[name] = process, ours
            for name in names:
                _turn(name, running, found)
        for _ in range(rounds):
            for name in list(running):
                _turn(name, running, found)
    finally:
        for process, _ in running.values():
            process.kill()
            process.join()
    return {name: Timed([s for s, _ in of], of[-1][1]) for name, of in found.items() if of}


def _turn(name, running, found):
    """Lets a contender prepare itself, or make one call."""
    process, pipe = running[name]
    try:
        if name in found:
            os.kill(process.pid, signal.SIGCONT)
            pipe.send(None)
        answer = pipe.recv()
    except (EOFError, OSError):  # it died while it prepared itself, or between turns
        process.join()
        answer = f"its process ended with status {process.exitcode}"
    if isinstance(answer, str):
        print(f"({name} left out: {answer})", flush=True)
        found.pop(name, None)
        del running[name]
        process.join()
        return
    os.kill(process.pid, signal.SIGSTOP)
    if name in found:
        found[name].append(answer)
    else:
        found[name] = []


def _serve(pipe, prepare, warm):
    try:
        call = prepare()
        for _ in range(warm):
            call()
        pipe.send(())
        while True:
            pipe.recv()
            start = time.perf_counter()
            value = call()
            pipe.send((time.perf_counter() - start, value))
    except EOFError:  # nobody asks any more
        pass
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}")


def peak_mb(call: Callable[[], Any]) -> float:
    """Returns the MB of memory of this process that a call needs at most, beyond those it had."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = resident_mb()
    call()
    return resident_mb("VmHWM") - before


def peak_anonymous_mb(call: Callable[[], Any]) -> float:
    """Returns the same without pages of files, which the system takes back as it likes."""
    before, seen, done = resident_mb("RssAnon"), [0.0], threading.Event()

    def watch():
        while not done.wait(0.005):
            seen.append(resident_mb("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        call()
    finally:
        done.set()
        thread.join()
    return max(seen) - before


def searches(ask: Callable, queries: np.ndarray, truth: np.ndarray) -> str:
    """Asks one by one; returns the recall of the true ids [Q, K], times and processor time."""
    times, shared, used = [], [], time.process_time()
    for query, right in zip(queries, truth, strict=True):
        begin = time.perf_counter()
        found = ask(query)
        times.append(1e3 * (time.perf_counter() - begin))
        shared.append(len(set(map(int, found)) & set(right.tolist())) / len(right))
    used = 1e3 * (time.process_time() - used) / len(times)
    median, slow = np.percentile(times, [50, 99])
    return (
        f"recall@{truth.shape[1]} {np.mean(shared):.4f}, median {median:.1f} ms, 99th percentile "
        f"{slow:.1f} ms, {used:.1f} ms of the processor"
    )


def resident_mb(field: str = "VmRSS") -> float:
    """Returns the MB of memory of this process, or with "VmHWM" their peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", status)[1]) / 2**10


def use_cores(count: int | None) -> None:
    """Pins this process, and those that it starts, to the first of its cores; None for all."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def gpus() -> list[str]:
    """Returns the names of NVIDIA's GPUs here, without starting anything on them."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True)
    return [] if found.returncode else found.stdout.splitlines()  # without a driver it complains


def machine() -> str:
    """Returns a line on the processor, the cores in use, and the versions of libraries."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = re.search(r"model name\s*:\s*(.+)", info)
    what = named[1].strip() if named else platform.machine()
    what = ", ".join([what, *gpus()])
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{what}, {len(os.sched_getaffinity(0))} cores; {', '.join(versions)}"
