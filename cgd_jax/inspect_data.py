"""`--mode=data`: the splits of a data set, and a batch as the network will see it."""

from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from cgd_jax.augment import augment
from cgd_jax.data.batches import batch_positions, make_batches
from cgd_jax.preprocess import IMAGENET
from cgd_jax.reports import plots, tables
from cgd_jax.rules import validate
from cgd_jax.run import fit_to_data, open_data
from cgd_jax.runtime import console
from cgd_jax.runtime.errors import ConfigError
from cgd_jax.train_step import step_key
from cgd_jax.workdir import check_writable


def show_data(config: ConfigDict, workdir: str) -> None:
    """Builds the data set and its caches, prints its splits, draws what the network will see.

    samples.png in the work folder shows the first batch after augmentation, class by class. Raises
    ConfigError.
    """
    validate(config)
    check_writable(workdir)
    dataset, _, labels = open_data(config)
    console.log(tables.dataset_table(dataset))
    problem = None
    try:
        config = fit_to_data(config, labels, jax.device_count())
    except ConfigError as error:  # which is no reason to show nothing
        problem = error
        config = config.copy_and_resolve_references()
        config.train.classes_per_batch = len(np.unique(labels))
    sample_indices = batch_positions(config, labels)
    images, _ = make_batches(sample_indices, dataset, labels)(0)
    train = dataset.train
    names = [train.class_names[label] for label in train.labels[sample_indices(0)].tolist()]
    key = step_key(config.seed, 0)
    size = config.data.crop_size or config.data.image_size
    images = jax.jit(augment, static_argnums=(2, 3))(
        key, images, FrozenConfigDict(config.augment), size, IMAGENET
    )
    path = Path(workdir, "samples.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    per_class = config.train.images_per_class
    columns = per_class * max(1, 12 // per_class)
    plots.plot_samples(path, np.asarray(images), names, columns, IMAGENET)
    console.log(f"\nLook at {path}: the first batch, {per_class} images of a class side by side.")
    if problem:
        console.log(f"\nTraining would not begin: {problem}")
