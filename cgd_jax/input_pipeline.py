"""From a data set on disk to batches on the device.

Which images make up batch number i depends on the seed and on i, on nothing else.
So a run is resumed by its step number alone, and any number of devices sees the
same batches.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import tensorflow_datasets as tfds

from cgd_jax import cache
from cgd_jax.datasets import Dataset, Split, builder_class

log = logging.getLogger(__name__)


def load_dataset(config, center_crop: bool = False) -> Dataset:
    """Builds a data set and its caches if they are not there yet, and opens them.

    Training images have the side `config.resize`, from which the network's input is
    cropped at random. Test images have the side `config.image_size`, as in the paper,
    or are made like the training images when the centre is to be cut out of them.

    Args:
      config: the `data` part of an experiment's config.
      center_crop: whether evaluation crops.

    Returns:
      The data set.

    Raises:
      FileNotFoundError, ValueError, OSError: what is wrong with the source, the data
        set or the disk, and what to do.
    """
    tfds.disable_progress_bar()  # the builders show their own
    builder = make_builder(config)
    # In place of its announcements of a download of unknown size.
    builder._log_download_bytes = lambda: log.info(
        "Building %s in %s", config.name, builder.data_dir
    )
    builder._log_download_done = lambda: None
    builder.download_and_prepare()
    test_size = config.resize if center_crop else config.image_size
    splits = {
        name: open_split(builder, name, config.resize if name == "train" else test_size, config)
        for name in builder.info.splits
    }
    return Dataset(
        train=splits["train"],
        query=splits["query"] if "query" in splits else splits["test"],
        gallery=splits.get("gallery"),
    )


def make_builder(config):
    """The TFDS builder that the `data` part of a config describes."""
    options = {}
    if config.name == "image_folder":
        options = {
            "seed": config.split_seed,
            "test_fraction": config.test_fraction,
            "nested_classes": config.nested_classes,
        }
    builder = builder_class(config.name)
    if needs_source(config.name):
        options["source"] = config.source
        options["allow_incomplete"] = config.allow_incomplete
        options["max_bad_fraction"] = config.max_bad_fraction
    return builder(data_dir=config.dir or None, file_format="array_record", **options)


def needs_source(name: str) -> bool:
    """Whether a data set is made of files that the user has, rather than drawn."""
    return hasattr(builder_class(name), "WANTED")


def open_split(builder, name: str, size: int, config) -> Split:
    """The images of one split, resized to squares.

    Args:
      builder: a prepared TFDS builder with the features image, label, class_name, id.
      name: of the split.
      size: side of the images in pixels.
      config: the `data` part of an experiment's config.

    Returns:
      The split, in the order of the files.
    """
    source = builder.as_data_source(name, decoders={"image": tfds.decode.SkipDecoding()})
    if config.cache == "none":
        opened = cache.Decoded(source, size, config.bbox_crop)
        images = opened
    else:
        key = {"data set": builder.info.full_name, "split": name}
        folder = Path(builder.data_dir, "cache")
        opened = cache.resized(source, folder, key, size, config.bbox_crop)
        images = opened.images
    skipped = Counter(row["split"] for row in getattr(builder, "skipped", list)())
    return Split(images, opened.labels, opened.ids, opened.class_names, skipped[name])


def class_members(labels: np.ndarray) -> list[np.ndarray]:
    """Positions of the images of every class.

    Args:
      labels: [N] integers.

    Returns:
      One array of positions a class, in the order of the sorted class numbers.
    """
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def pk_batch(
    members: list[np.ndarray], seed: int, step: int, classes: int, images_per_class: int
) -> np.ndarray:
    """Which images make up batch number `step`: P classes with K images each.

    The classes are shuffled anew every epoch and taken in turn, so that an epoch
    shows every class once (but for fewer than P left over). A class with fewer than
    K images shows all of them and repeats some.

    Args:
      members: positions of the images of every class, from `class_members`.
      seed: of the experiment.
      step: number of the batch, from 0.
      classes: P.
      images_per_class: K.

    Returns:
      [P·K] positions, the images of a class side by side.

    Raises:
      ValueError: there are fewer than P classes.
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


def prefetch(
    make_batch: Callable[[int], tuple], steps: range, sharding: jax.sharding.Sharding
) -> Iterator[tuple]:
    """Makes batches in a thread while the device works, two steps ahead.

    Args:
      make_batch: step → tuple of arrays whose first axis is the batch, or of several
        processes the rows that this one provides.
      steps: the steps whose batches are wanted.
      sharding: how the first axis is laid over the devices.

    Yields:
      The tuples in order, on the devices.
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
