"""All cores at work on independent items."""

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel(function: Callable[[Any], Any], items: Iterable, ahead: int = 4) -> Iterator:
    """Yield ``function(item)`` for each item, in order, computed by one thread per core.

    At most ``ahead`` results per core wait to be taken, so memory does not grow with the
    number of items.
    """
    with ThreadPoolExecutor(CORES) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead * CORES:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
