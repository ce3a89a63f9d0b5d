"""Which images make up a batch, and their way to the device.

Batch number i follows from the seed and i alone. So a run is resumed by its step number, and
any number of devices sees the same batches.
"""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from ml_collections import ConfigDict

from cgd_jax.data import Dataset


def class_members(labels: np.ndarray) -> list[np.ndarray]:
    """Returns the positions of the images of every class, in the order of the class numbers."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def pk_batch(
    members: list[np.ndarray], seed: int, step: int, classes: int, images_per_class: int
) -> np.ndarray:
    """Draws the positions [P·K] of batch number `step`: P classes with K images side by side.

    The classes are shuffled anew every epoch and taken in turn, so that an epoch shows every class
    once (except the fewer than P that are left over). A class with fewer than K images repeats
    some.
    """
    if classes > len(members):
        raise ValueError(
            f"a batch of {classes} classes cannot be drawn from {len(members)} classes; lower "
            f"train.classes_per_batch."
        )
    batches_per_epoch = len(members) // classes
    epoch, position = divmod(step, batches_per_epoch)
    shuffled = np.random.default_rng([seed, 0, epoch]).permutation(len(members))
    rng = np.random.default_rng([seed, 1, step])
    return np.concatenate(
        [
            np.resize(rng.permutation(members[c]), images_per_class)
            for c in shuffled[position * classes : (position + 1) * classes]
        ]
    )


def batch_positions(config: ConfigDict, labels: np.ndarray) -> Callable[[int], np.ndarray]:
    """Returns a function: step, from 0 → positions [B] of the training images of its batch."""
    members, train = class_members(labels), config.train

    def choose(step: int) -> np.ndarray:
        return pk_batch(members, config.seed, step, train.classes_per_batch, train.images_per_class)

    return choose


def make_batches(
    choose: Callable[[int], np.ndarray],
    dataset: Dataset,
    labels: np.ndarray,
    rows: slice | np.ndarray = slice(None),
) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """Returns a function: step → (images [B, S, S, 3] uint8, labels [B]) of rows of its batch."""

    def make_batch(step: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = choose(step)[rows]
        return dataset.train.images[chosen], labels[chosen]

    return make_batch


def prefetch(
    make_batch: Callable[[int], tuple], steps: range, sharding: jax.sharding.Sharding
) -> Generator[tuple, None, None]:
    """Yields the batches of `steps` on the devices, made in a thread two steps ahead.

    `make_batch` gives arrays whose first axis is the batch, or of several processes the rows that
    this one provides; `sharding` lays that axis over the devices.
    """

    def put(step):
        return tuple(
            jax.make_array_from_process_local_data(sharding, array) for array in make_batch(step)
        )

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        ahead = deque(pool.submit(put, step) for step in steps[:2])
        for i in range(len(steps)):
            batch = ahead.popleft().result()
            if i + 2 < len(steps):
                ahead.append(pool.submit(put, steps[i + 2]))
            yield batch
