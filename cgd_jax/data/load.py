"""From the `data` part of a config to images in memory-mapped arrays."""

import logging
from collections import Counter
from pathlib import Path

import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from cgd_jax.data import Dataset, Split, builder_class, cache, config_keys

log = logging.getLogger(__name__)


def load_dataset(config: ConfigDict, center_crop: bool = False) -> Dataset:
    """Builds a data set and its caches if they are not there yet, and opens them.

    Training images have the side `config.resize`, out of which training crops the network's
    input at random. Test images have the side `config.image_size`, as in the paper; or
    `config.resize` too, if evaluation cuts out their centre.

    Args:
      config: the `data` part of an experiment's config.
      center_crop: whether evaluation crops.

    Raises:
      FileNotFoundError, ValueError, OSError: what is wrong with the source, the data
        set or the disk, and what to do.
    """
    tfds.disable_progress_bar()  # the builders show their own
    builder = make_builder(config)
    # TFDS would announce a download of unknown size.
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


def make_builder(config: ConfigDict) -> tfds.core.DatasetBuilder:
    """Makes the TFDS builder that the `data` part of a config describes."""
    options = {key: config[key] for key in config_keys(config.name)}
    return builder_class(config.name)(
        data_dir=config.dir or None, file_format="array_record", **options
    )


def open_split(
    builder: tfds.core.DatasetBuilder, name: str, size: int, config: ConfigDict
) -> Split:
    """Opens one split of a prepared data set, its images resized to squares.

    Args:
      builder: has prepared examples with the features image, label, class_name and id.
      name: of the split.
      size: side of the images in pixels.
      config: the `data` part of an experiment's config.
    """
    source = builder.as_data_source(name, decoders={"image": tfds.decode.SkipDecoding()})
    if config.cache == "none":
        split = cache.decoded(source, size, config.bbox_crop)
    else:
        key = {"data set": builder.info.full_name, "split": name}
        folder = Path(builder.data_dir, "cache")
        split = cache.cached(source, folder, key, size, config.bbox_crop)
    skipped = Counter(row["split"] for row in getattr(builder, "skipped", list)())
    return split._replace(skipped=skipped[name])
