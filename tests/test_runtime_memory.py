"""What the C library does with freed memory, and Python with objects that stay."""

import gc
import subprocess
import sys

import pytest

from cgd_jax.runtime import memory

# Takes and frees 64 MB in a thread, as XLA does, and prints how often the kernel had to help.
ROUNDS = """
import resource, sys, threading
from cgd_jax.runtime import memory

faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts, size = [], 64 << 20  # a constant would be made once, by the compiler

def rounds():
    for _ in range(3):
        before = faults()
        bytes(b"x") * size
        counts.append(faults() - before)

kept = len(sys.argv) > 1 and memory.keep_freed_memory()
thread = threading.Thread(target=rounds)
thread.start()
thread.join()
print(kept, counts[-1])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_freed_memory_is_used_again():
    def run(*arguments):
        command = [sys.executable, "-c", ROUNDS, *arguments]
        kept, faults = subprocess.check_output(command, text=True).split()
        return kept == "True", int(faults)

    kept, faults = run("keep")
    if not kept:
        pytest.skip("there is an accelerator, or the C library is not glibc.")
    assert faults < 100 < 1000 < run()[1]


def test_hosts_of_accelerators_and_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    assert not memory.keep_freed_memory()
    monkeypatch.setattr(memory.importlib.metadata, "entry_points", lambda group: [group])
    monkeypatch.setattr(memory.ctypes, "CDLL", None)
    assert not memory.keep_freed_memory()


def test_python_looks_for_cycles_rarely():
    before, collected = gc.get_threshold(), []
    count = lambda phase, info: phase == "start" and collected.append(info)
    gc.callbacks.append(count)
    try:
        memory.collect_garbage_rarely()
        gc.collect()
        collected.clear()
        stay = [[] for _ in range(40_000)]
        assert len(stay) == 40_000 and not collected
    finally:
        gc.callbacks.remove(count)
        gc.set_threshold(*before)
