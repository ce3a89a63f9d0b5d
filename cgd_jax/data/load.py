"""From the `data` part of a config to images in memory-mapped arrays."""

import logging
from collections import Counter
from pathlib import Path

import tensorflow_datasets as tfds

from cgd_jax.data import Dataset, Split, builder_class, cache, needs_source

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
