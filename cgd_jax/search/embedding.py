"""Any number of images, read by all cores and embedded in batches that suit the device."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from cgd_jax.runtime.console import progress
from cgd_jax.runtime.threads import CORES, parallel
from cgd_jax.search.network import Network

__all__ = ["batch_sizes", "embed_pixels", "enough", "read_and_embed"]

# An accelerator embeds batches of these sizes, each of which is compiled once; any number is a sum
# of them. On a CPU every core embeds one image at a time: in a batch, an image takes longer.
BATCHES = (1, 16, 128)

Item = TypeVar("Item")


def batch_sizes() -> tuple[int, ...]:
    """Returns how many images the device embeds at a time, each of which is compiled once."""
    return BATCHES if _on_accelerator() else (1,)


def enough() -> int:
    """Returns how many images, embedded together, keep the device busy."""
    return BATCHES[-1] if _on_accelerator() else 4 * CORES


def embed_pixels(network: Network, pixels: np.ndarray) -> np.ndarray:
    """Embeds any number of images [B, resize, resize, 3] uint8: [B, D] float32."""
    sizes, batches, at = batch_sizes(), [], 0
    while at < len(pixels):
        size = max(size for size in sizes if size <= len(pixels) - at)
        batches.append(pixels[at : at + size])
        at += size
    each = map if _on_accelerator() else parallel
    return np.concatenate(list(each(lambda x: np.asarray(network.embed(x), np.float32), batches)))


def read_and_embed(
    items: Sequence[Item],
    read: Callable[[Item], tuple[np.ndarray, dict[str, Any]] | str | None],
    embed: Callable[[np.ndarray], np.ndarray],
    what: str | None = None,
) -> Iterator[tuple[Item, Any, np.ndarray | None]]:
    """Reads images ahead in threads, while the device embeds those that could be read.

    Args:
      items: to read.
      read: returns what `images.read` does, or anything else where there is nothing to embed.
      embed: [B, side, side, 3] uint8 → [B, D].
      what: is being done, for a progress bar; None for none.

    Yields:
      For every item: itself, the fields that `read` found, and the vector [D]; or itself, what
      `read` returned instead, and None.
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


def _embedded(waiting: list, embed: Callable[[np.ndarray], np.ndarray]) -> Iterator[tuple]:
    vectors = embed(np.stack([pixels for _, (pixels, _) in waiting]))
    for (item, (_, fields)), vector in zip(waiting, vectors, strict=True):
        yield item, fields, vector


def _on_accelerator() -> bool:
    import jax  # late, so that an index that is up to date is known to be in a moment

    return jax.default_backend() != "cpu"
