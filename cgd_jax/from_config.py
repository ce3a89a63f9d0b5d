"""What a config describes: the data set, the network, the optimizer, the state at step 0."""

import math
from typing import NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from cgd_jax.config import ConfigError, validate
from cgd_jax.data import Dataset
from cgd_jax.data.load import load_dataset
from cgd_jax.models import pretrained
from cgd_jax.models.cgd import CGD, create_model
from cgd_jax.optimizer import make_optimizer
from cgd_jax.runtime import processes
from cgd_jax.train_step import State, create_state, shardings


class Setup(NamedTuple):
    """What training and evaluation both start from."""

    dataset: Dataset
    labels: np.ndarray  # [N] int32, of the training images, in [0, M)
    model: CGD
    optimizer: optax.GradientTransformation
    state: State  # at step 0, on all devices
    split: jax.sharding.NamedSharding  # of a batch
    mesh: jax.sharding.Mesh  # all devices


def set_up(config: ConfigDict) -> Setup:
    """Checks the config, reads the data set, makes the network.

    Args:
      config: of the experiment.

    Returns:
      The parts of a run; the same config gives the same state.

    Raises:
      ConfigError: says what in the config cannot be run.
    """
    validate(config)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (jax.sharding.AxisType.Auto,))
    replicated, split = shardings(mesh)
    check_batch(config.train, mesh.size)
    dataset, labels = open_data(config)
    classes = np.unique(labels)
    model = create_model(config.model, len(classes))
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    averaged = config.optimizer.average > 0
    state = create_state(
        model, optimizer, config.seed, config.data.image_size, replicated, averaged
    )
    return Setup(dataset, labels, model, optimizer, state, split, mesh)


def check_batch(config: ConfigDict, devices: int) -> None:
    """Checks that a batch, and every chunk of it, can be shared out evenly.

    Args:
      config: the `train` part of an experiment's config.
      devices: how many.

    Raises:
      ConfigError: they cannot; it names sizes that can.
    """
    classes, per_class, chunk = (
        config.classes_per_batch,
        config.images_per_class,
        config.embed_chunk,
    )
    images = classes * per_class
    if images % devices:
        step = devices // math.gcd(devices, per_class)  # of the number of classes
        fitting = [n for n in (classes // step * step, (classes // step + 1) * step) if n > 1]
        raise ConfigError(
            f"train.classes_per_batch={classes} × train.images_per_class={per_class} = {images} "
            f"images cannot be split evenly over {devices} devices; with {per_class} images a "
            f"class {' or '.join(map(str, fitting))} classes can."
        )
    if chunk % devices or (chunk and images % chunk):
        fitting = [str(n) for n in range(devices, images, devices) if images % n == 0]
        raise ConfigError(
            f"train.embed_chunk={chunk} must divide the batch of {images} images and be a multiple "
            f"of the {devices} devices; {', '.join(['0', *fitting])} are such numbers."
        )


def load_pretrained(source: str, state: State) -> State:
    """Puts published weights into the backbone of a state at step 0.

    Args:
      source: as `pretrained.load` takes it.
      state: from `create_state`.

    Returns:
      The state with them, laid over the devices as before.

    Raises:
      ConfigError: no such source, or one that does not fit the network.
    """
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    try:
        loaded, normalization = pretrained.load(variables, source)
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(f"model.pretrained: {error}") from error
    average = None if state.average is None else loaded["params"]
    new = state.replace(**loaded, normalization=normalization, average=average)
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), new, state)


def open_data(config: ConfigDict) -> tuple[Dataset, np.ndarray]:
    """The data set of a config, and the labels [N] int32 of its training images in [0, M).

    Raises:
      ConfigError: what is wrong with the source, the data set or the disk.
    """
    try:
        # What the first process builds the others find built, if they share its disk.
        if not processes.is_first():
            processes.wait_for_all("the data set is built")
        dataset = load_dataset(config.data, config.eval.center_crop)
        if processes.is_first():
            processes.wait_for_all("the data set is built")
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    classes, labels = np.unique(dataset.train.labels, return_inverse=True)
    if config.train.classes_per_batch > len(classes):
        raise ConfigError(
            f"train.classes_per_batch={config.train.classes_per_batch}, but {config.data.name} "
            f"has {len(classes)} training classes."
        )
    return dataset, labels.astype(np.int32)
