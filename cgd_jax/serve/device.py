"""Who computes: the one thread that uses the device, and those that decode."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Condition, Lock
from typing import TypeVar

import numpy as np

from cgd_jax.runtime.threads import CORES

__all__ = ["Decoder", "Device", "Threads"]

T = TypeVar("T")


class Threads:
    """Some threads that compute; what is cancelled before its turn is never begun."""

    def __init__(self, count: int, name: str):
        self._threads = ThreadPoolExecutor(count, name)

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """Calls a function in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)


class Decoder(Threads):
    """A thread per core; what they decode at a time has so many pixels in all, which is memory."""

    def __init__(self, pixels: int):
        super().__init__(CORES, "decoder")
        self.free = pixels
        self._turn, self._freed = Lock(), Condition()

    @contextlib.contextmanager
    def holding(self, pixels: int) -> Iterator[None]:
        """Waits in a thread until so many pixels are free; small images overtake no large one."""
        with self._turn, self._freed:
            self._freed.wait_for(lambda: self.free >= pixels)
            self.free -= pixels
        try:
            yield
        finally:
            with self._freed:
                self.free += pixels
                self._freed.notify_all()


class Device(Threads):
    """Embeds what concurrent requests ask for in batches.

    What arrives while the device is busy makes up the next batch; nothing waits for company.
    """

    def __init__(self, embed: Callable[[list], np.ndarray], batch_size: int):
        super().__init__(1, "device")
        self._embed, self._batch_size = embed, batch_size
        self._waiting: list[tuple[np.ndarray, asyncio.Future]] = []
        self._busy: asyncio.Task | None = None

    async def embed(self, pixels: np.ndarray) -> np.ndarray:
        """Returns the vector [D] of an image [H, W, 3] uint8."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((pixels, future))
        if self._busy is None:
            self._busy = asyncio.create_task(self._embed_waiting())
        return await future

    async def _embed_waiting(self) -> None:
        try:
            # Clients that have left cancelled their futures: nothing is embedded for them.
            while waiting := [one for one in self._waiting if not one[1].done()]:
                batch, self._waiting = waiting[: self._batch_size], waiting[self._batch_size :]
                try:
                    vectors = await self.run(self._embed, [pixels for pixels, _ in batch])
                except Exception as error:
                    for _, future in batch:
                        if not future.done():
                            future.set_exception(error)
                else:
                    for (_, future), vector in zip(batch, vectors, strict=True):
                        if not future.done():
                            future.set_result(vector)
        finally:
            self._busy = None
