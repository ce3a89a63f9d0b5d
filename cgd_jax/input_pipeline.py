"""From a data set on disk to batches on the device.

Which images make up batch number i depends on the seed and on i, on nothing else.
So a run is resumed by its step number alone, and any number of devices sees the
same batches.
"""

import io
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from cgd_jax.datasets import Dataset, Split, builder_class


def load_dataset(config) -> Dataset:
    """Builds a data set if it is not there yet, and reads it.

    Args:
      config: the `data` part of an experiment's config.

    Returns:
      The data set, images of side `config.image_size`.
    """
    tfds.disable_progress_bar()  # the builders show their own
    builder = builder_class(config.name)(data_dir=config.dir or None, file_format="array_record")
    builder.download_and_prepare()
    splits = {name: read_split(builder, name, config.image_size) for name in builder.info.splits}
    return Dataset(
        train=splits["train"],
        query=splits["query"] if "query" in splits else splits["test"],
        gallery=splits.get("gallery"),
    )


def read_split(builder, name: str, image_size: int) -> Split:
    """Decodes one split into memory.

    Args:
      builder: a prepared TFDS builder with the features image, label, class_name, id.
      name: of the split.
      image_size: S; images of another size are resized to S × S.

    Returns:
      The split, in the order of the files.
    """
    source = builder.as_data_source(name, decoders={"image": tfds.decode.SkipDecoding()})
    images = np.empty((len(source), image_size, image_size, 3), np.uint8)
    labels = np.empty(len(source), np.int64)
    class_names, ids = [], []
    progress = tqdm(
        source, desc=f"{builder.name}: reading {name}", unit="image", leave=False, disable=None
    )
    for i, example in enumerate(progress):
        image = Image.open(io.BytesIO(example["image"])).convert("RGB")
        if image.size != (image_size, image_size):
            image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
        images[i] = np.asarray(image)
        labels[i] = example["label"]
        class_names.append(example["class_name"].decode())
        ids.append(example["id"].decode())
    return Split(images, labels, class_names, ids)


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
      make_batch: step → tuple of arrays whose first axis is the batch.
      steps: the steps whose batches are wanted.
      sharding: how the first axis is laid over the devices.

    Yields:
      The tuples in order, on the devices.
    """

    def put(step):
        return tuple(jax.device_put(array, sharding) for array in make_batch(step))

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        ahead = deque(pool.submit(put, step) for step in steps[:2])
        for i in range(len(steps)):
            batch = ahead.popleft().result()
            if i + 2 < len(steps):
                ahead.append(pool.submit(put, steps[i + 2]))
            yield batch
