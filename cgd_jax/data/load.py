"""From the `data` part of a config to images in memory-mapped arrays."""

import logging
import math
import os
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from cgd_jax.data import Dataset, Split, builder_class, cache, check_queries, config_keys
from cgd_jax.data.dataset import listed, rows_of
from cgd_jax.runtime.errors import InputError

log = logging.getLogger(__name__)

TRAINED, SEARCHED = ("train", "val"), ("test", "query", "gallery")


def load_dataset(config: ConfigDict, center_crop: bool = False) -> Dataset:
    """Builds the data set of a config's `data` part and its caches if need be, and opens them.

    What is tested on is of the data set `config.test_name`, if one is named.

    Training images have the side `config.resize`, out of which training crops the network's input
    at random. Test images have the side `config.image_size`, as in the paper; or `config.resize`
    too, if evaluation cuts out their center. Raises InputError or OSError: what is wrong, and what
    to do.
    """
    tfds.disable_progress_bar()  # the builders show their own
    if config.test_name:
        other = config.copy_and_resolve_references()
        other.update(name=config.test_name, source=config.test_source)
        splits, _ = _open_splits(config, center_crop, TRAINED)
        try:
            tested, builder = _open_splits(other, center_crop, SEARCHED)
        except InputError as error:
            raise InputError(str(error).replace("data.source", "data.test_source")) from error
        if "train" in splits:
            first = 1 + max(int(split.labels.max()) for split in splits.values())
            splits |= {name: _numbered_from(first, split) for name, split in tested.items()}
    else:
        splits, builder = _open_splits(config, center_crop, (*TRAINED, *SEARCHED))
    if "train" not in splits:
        raise InputError(
            f"{config.name} has no images to train on: name it with --config.data.test_name and "
            "--config.data.test_source, beside a data set that has."
        )
    if not splits.keys() & set(SEARCHED):
        raise InputError(
            f"{builder.name} has no images to test on: name a data set that has with "
            "--config.data.test_name and --config.data.test_source, such as places or roxford5k."
        )
    query = splits["query"] if "query" in splits else splits["test"]
    dataset = Dataset(splits["train"], query, splits.get("gallery"))
    if hasattr(builder, "truth"):
        dataset = _with_truth(dataset, builder, radius=config.radius, turn=config.turn)
    else:
        # The published numbers are those of the whole sets, copies included.
        dataset = _handle_copies(dataset, bool(getattr(builder, "PUBLISHED", None)))
        check_queries(dataset)
        _warn_of_classes(dataset)
    if "val" in splits:
        check_queries(Dataset(dataset.train, splits["val"], None))
        dataset = dataset._replace(validation=splits["val"])
    for purpose, part in (("trains on", dataset.train), ("tests on", dataset.query)):
        names = [part.class_names[label] for label in np.unique(part.labels).tolist()]
        count = f"{len(names):,} class{'es' * (len(names) != 1)}"
        log.info("%s %s %s: %s", config.name, purpose, count, listed(names))
    return dataset


def _open_splits(
    config: ConfigDict, center_crop: bool, wanted: tuple[str, ...]
) -> tuple[dict[str, Split], tfds.core.DatasetBuilder]:
    """Builds a data set if need be, and opens those of its splits that are wanted."""
    try:
        (config.dir and os.path.abspath(config.dir)).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"--config.data.dir={config.dir!r}: data sets cannot be built in a folder whose name "
            "is not valid UTF-8. Choose another one."
        ) from error
    options = {key: config[key] for key in config_keys(config.name)}
    options |= {"data_dir": config.dir or None, "file_format": "array_record"}
    builder = builder_class(config.name)(**options)
    # TFDS would announce a download of unknown size.
    builder._log_download_bytes = lambda: log.info("Building %s", builder.data_dir)
    builder._log_download_done = lambda: None
    train_size, test_size = config.resize, config.resize if center_crop else config.image_size
    try:
        builder.download_and_prepare()
        splits = {
            name: _open_split(builder, name, train_size if name == "train" else test_size, config)
            for name in builder.info.splits
            if name in wanted
        }
        return splits, builder
    except OSError as error:
        if error.filename and Path(error.filename).is_relative_to(builder.data_dir_root):
            raise OSError(
                f"{config.name} cannot be built in {builder.data_dir_root} ({error}). Let "
                "--config.data.dir=FOLDER name a folder that you can write to."
            ) from error
        raise


def _numbered_from(first: int, split: Split) -> Split:
    """Returns a split whose labels are none of those of another data set."""
    names = {first + label: name for label, name in split.class_names.items()}
    return split._replace(labels=first + split.labels, class_names=names)


def _with_truth(dataset: Dataset, builder: tfds.core.DatasetBuilder, **near: float) -> Dataset:
    """Adds what is right for the queries; copies are found or not as the protocol has it."""
    query, gallery = dataset.query, dataset.gallery
    assert gallery is not None  # what a protocol is of has one
    truth = builder.truth(query.ids, gallery.ids, **near)
    lost = sum(len(row) == 0 for row in truth.positives)
    if lost == len(truth.positives):
        raise InputError(
            f"None of the {lost:,} queries of {builder.name} has anything to find in the gallery. "
            "Of places, --config.data.radius says within how many metres."
        )
    if lost:
        log.warning("%d of %d queries have nothing to find.", lost, len(truth.positives))
    query = query._replace(truth=truth, contents=None)
    return dataset._replace(query=query, gallery=gallery._replace(contents=None))


def _open_split(
    builder: tfds.core.DatasetBuilder, name: str, size: int, config: ConfigDict
) -> Split:
    """Opens one split of a prepared data set, its images resized to squares."""
    source = builder.as_data_source(name, decoders={"image": tfds.decode.SkipDecoding()})
    examples = cache.encoded(source, config.bbox_crop)
    if config.cache == "none":
        split = cache.decoded(examples, size)
    else:
        most = math.inf if config.cache == "disk" else int(config.cache[:-2]) * 1e9
        key = {"data set": builder.info.full_name, "split": name, "crop": config.bbox_crop}
        folder = Path(builder.data_dir, "cache")
        split = cache.cached(examples, folder, key, size, most)._replace(cache=folder)
    skipped = builder.report("skipped") if hasattr(builder, "report") else []
    skips = sum(row["split"] == name for row in skipped)
    return split._replace(encoded=examples, skipped=skips)


def _handle_copies(dataset: Dataset, keep: bool) -> Dataset:
    """Leaves out copies of test images that would find themselves, and reports the others.

    `keep`: whether queries that search each other keep their copies.
    """
    train, query, gallery, _ = dataset
    asked = np.asarray(query.contents)
    seen = np.isin(asked, np.asarray(train.contents))
    _warn(query, seen, "test images are in the training set too")
    if gallery is None:
        # A copy under another label is a neighbour like any other: a wrong one.
        copies = _repeated(np.stack([asked, query.labels], 1))
        done = "find their copies" if keep else "are left out"
        _warn(query, copies, f"test images are copies of others of their class, and {done}")
        return dataset if keep else dataset._replace(query=rows_of(query, ~copies))
    searched = np.asarray(gallery.contents)
    both = np.isin(searched, asked)
    _warn(gallery, both, "images of the gallery are queries too; no query finds itself")
    # `own_rows` names one copy of each.
    return dataset._replace(gallery=rows_of(gallery, ~(both & _repeated(searched))))


def _repeated(values: np.ndarray) -> np.ndarray:
    """Marks the rows [N] that stand further up already."""
    repeated = np.ones(len(values), bool)
    repeated[np.unique(values, axis=0, return_index=True)[1]] = False
    return repeated


def _warn(split: Split, chosen: np.ndarray, what: str) -> None:
    """Reports the rows of a split that are chosen, [N] bool, if any are."""
    if chosen.any():
        ids = [split.ids[i] for i in np.flatnonzero(chosen)[:4]]
        log.warning("%d of %d %s: %s", chosen.sum(), len(chosen), what, listed(ids, 3))


def _warn_of_classes(dataset: Dataset) -> None:
    """Reports what is allowed but changes what the numbers mean."""
    train, query, gallery, _ = dataset
    tested, counts = np.unique(query.labels, return_counts=True)
    trained, images = np.unique(train.labels, return_counts=True)
    alone = tested[counts == 1] if gallery is None else np.setdiff1d(tested, gallery.labels)
    lonely = "have no second image to find, so that their queries count as misses or not at all"
    seen = "are trained on too: they are not unseen"
    repeated = "have a single image, which is repeated; add others"
    for classes, every, split, text in (
        (alone, tested, query, f"test classes {lonely}"),
        (np.intersect1d(tested, trained), tested, query, f"test classes {seen}"),
        (trained[images == 1], trained, train, f"training classes {repeated}"),
    ):
        if len(classes):
            names = listed([split.class_names[label] for label in classes.tolist()])
            log.warning("%d of %d %s: %s", len(classes), len(every), text, names)
