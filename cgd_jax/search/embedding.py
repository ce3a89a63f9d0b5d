"""Images on their way to vectors: read ahead by all cores while the device embeds."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from cgd_jax.network import BATCHES, enough
from cgd_jax.runtime.console import progress
from cgd_jax.runtime.threads import CORES, parallel

Item = TypeVar("Item")


def read_and_embed(
    items: Sequence[Item],
    read: Callable[[Item], Any],
    embed: Callable[[Sequence[np.ndarray]], np.ndarray],
    what: str | None = None,
) -> Iterator[tuple[Item, Any, np.ndarray | None]]:
    """Reads images ahead in threads, while the device embeds those that could be read.

    `read` returns what `images.read` does, or anything else where there is nothing to embed.
    Yields every item with the fields that `read` found and the vector [D], or with what `read`
    returned instead and None. `what` is said to be done by a progress bar.
    """
    waiting: list[tuple[Item, tuple[np.ndarray, dict]]] = []
    # So many are ahead that the next batch is there when the device is free.
    outcomes = parallel(read, items, 2 * BATCHES[-1] // CORES)
    with progress(len(items), what) if what and items else contextlib.nullcontext() as bar:
        for item, outcome in zip(items, outcomes, strict=True):
            if bar:
                bar.update()
            if not isinstance(outcome, tuple):
                yield item, outcome, None
                continue
            waiting.append((item, outcome))
            if len(waiting) == enough():
                yield from _embedded(waiting, embed)
                waiting.clear()
        if waiting:
            yield from _embedded(waiting, embed)


def _embedded(waiting: list, embed: Callable[[Sequence[np.ndarray]], np.ndarray]) -> Iterator:
    vectors = embed([pixels for _, (pixels, _) in waiting])
    for (item, (_, fields)), vector in zip(waiting, vectors, strict=True):
        yield item, fields, vector
