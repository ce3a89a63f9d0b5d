"""Settings of two allocators, the C library's and Python's, for programs that use JAX."""

import ctypes
import gc
import importlib.metadata
import importlib.util

# Parameters of glibc's mallopt, from malloc.h, with the values that we give them.
_TRIM_THRESHOLD = (-1, -1)  # nothing is given back to the system,
_MMAP_MAX = (-4, 0)  # large blocks come from the heap too,
_ARENA_MAX = (-8, 1)  # of which all threads share one, since the others are given back


def keep_freed_memory() -> bool:
    """Makes the C library keep what is freed, before JAX starts its threads; returns if it does.

    XLA frees the temporary memory of a program when it has run, glibc gives large blocks back, and
    the next step takes them again page by page: on a CPU that is more than a quarter of a training
    step's time (`benchmarks/allocation.py`). An accelerator's programs have their memory on the
    device, and its hosts so many cores that one heap would be in demand.
    """
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    if plugins or any(map(importlib.util.find_spec, ("jax_plugins", "libtpu"))):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(*option) for option in (_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX)
    )


def collect_garbage_rarely() -> None:
    """Lets Python look for cycles after 50,000 new objects: importing JAX makes many that stay."""
    gc.set_threshold(50_000)
