"""All cores at work on independent items."""

import collections
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Condition, Lock
from typing import TypeVar

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel(
    function: Callable[[Item], Result], items: Iterable[Item], ahead: int = 4
) -> Iterator[Result]:
    """Yields `function(item)` for each item, in order, computed by one thread per core.

    At most `ahead` results per core wait to be taken, so that memory does not grow with the
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


class Budget:
    """An amount of something, such as memory, that threads share."""

    def __init__(self, amount: int):
        self.free = amount
        self._turn, self._freed = Lock(), Condition()

    @contextlib.contextmanager
    def holding(self, amount: int) -> Iterator[None]:
        """Waits until so much is free; who wants little overtakes nobody who wants much."""
        with self._turn, self._freed:
            self._freed.wait_for(lambda: self.free >= amount)
            self.free -= amount
        try:
            yield
        finally:
            with self._freed:
                self.free += amount
                self._freed.notify_all()
