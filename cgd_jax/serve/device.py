"""The one thread that uses the device, and how many requests may wait for it."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from fastapi import HTTPException

__all__ = ["Device", "Gate"]


class Gate:
    """Lets as many requests in as can be served in good time, and refuses others at once."""

    def __init__(self, capacity: int):
        self.capacity, self.inside = capacity, 0

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Counts a request for as long as the block runs.

        Raises:
          HTTPException: 503, there are too many already.
        """
        if self.inside >= self.capacity:
            raise HTTPException(503, "Too many searches at once; try again.", {"Retry-After": "1"})
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


class Device:
    """Embeds what concurrent requests ask for in batches.

    What arrives while the device is busy makes up the next batch; nothing waits for company.
    """

    def __init__(self, embed: Callable[[np.ndarray], np.ndarray], batch_size: int):
        self._embed, self._batch_size = embed, batch_size
        self._thread = ThreadPoolExecutor(1, "device")
        self._waiting: list[tuple[np.ndarray, asyncio.Future]] = []
        self._busy: asyncio.Task | None = None

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function on the device's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def embed(self, pixels: np.ndarray) -> np.ndarray:
        """Returns the vector [D] of an image [S, S, 3] uint8."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((pixels, future))
        if self._busy is None:
            self._busy = asyncio.create_task(self._embed_waiting())
        return await future

    async def _embed_waiting(self) -> None:
        try:
            while self._waiting:
                batch = self._waiting[: self._batch_size]
                del self._waiting[: self._batch_size]
                try:
                    vectors = await self.run(self._embed, np.stack([pixels for pixels, _ in batch]))
                except Exception as error:
                    for _, future in batch:
                        if not future.done():  # a client that has left cancelled it
                            future.set_exception(error)
                else:
                    for (_, future), vector in zip(batch, vectors, strict=True):
                        if not future.done():
                            future.set_result(vector)
        finally:
            self._busy = None
