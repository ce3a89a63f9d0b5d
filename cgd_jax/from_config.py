"""What a config describes: the data set, the network, the optimizer, the state at step 0."""

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from cgd_jax import checkpoint
from cgd_jax.config import AUTO, validate
from cgd_jax.data import Dataset
from cgd_jax.data.load import load_dataset
from cgd_jax.models import backbones, pretrained, weight_files
from cgd_jax.models.cgd import CGD, create_model, network_params
from cgd_jax.objective import loss_param_counts
from cgd_jax.optimizer import make_optimizer
from cgd_jax.runtime import processes
from cgd_jax.runtime.errors import ConfigError
from cgd_jax.train_step import State, create_state, shardings


class Setup(NamedTuple):
    """What training and evaluation both start from."""

    dataset: Dataset
    labels: np.ndarray  # [N] int32, of the training images, in [0, M)
    model: CGD
    optimizer: optax.GradientTransformation
    state: State  # at step 0, on all devices
    batch_sharding: jax.sharding.NamedSharding  # divides the first axis over all devices

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """All devices."""
        mesh = self.batch_sharding.mesh
        assert isinstance(mesh, jax.sharding.Mesh)  # an abstract one has no devices
        return mesh


def set_up(config: ConfigDict) -> Setup:
    """Opens the data set and makes the network of a valid config.

    Returns:
      The parts of a run; the same config gives the same state.

    Raises:
      ConfigError: The data cannot be used, or a batch does not fit the data or the devices.
    """
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (jax.sharding.AxisType.Auto,))
    replicated, batch_sharding = shardings(mesh)
    check_batch(config.train, mesh.size)
    dataset, labels = open_data(config)
    check_options(config, dataset)
    model = create_model(config.model, len(np.unique(labels)))
    proxies = bool(loss_param_counts(config.loss))
    optimizer = make_optimizer(config.optimizer, config.train.steps, model.backbone, proxies)
    state = create_state(
        model,
        optimizer,
        config.seed,
        config.data.image_size,
        replicated,
        average=config.optimizer.ema_decay > 0,
        normalization=backbones.normalization_of(config.model.backbone),
        loss=config.loss,
    )
    return Setup(dataset, labels, model, optimizer, state, batch_sharding)


def name_backbone(config: ConfigDict) -> ConfigDict:
    """Returns a valid config, in which the backbone has its name in the place of "auto".

    Raises:
      ConfigError: The config cannot be run, or nothing says which backbone the weights are of.
    """
    validate(config)
    if config.model.backbone != AUTO:
        return config
    config = config.copy_and_resolve_references()
    try:
        config.model.backbone = weight_files.declared_backbone(config.model.pretrained)
    except (ValueError, OSError) as error:
        raise ConfigError(f"model.backbone=auto: {error}") from error
    validate(config)
    return config


def check_batch(config: ConfigDict, devices: int) -> None:
    """Checks that a batch, and every chunk of it, can be shared out evenly.

    Args:
      config: the `train` part of an experiment's config.
      devices: how many there are.

    Raises:
      ConfigError: They cannot; it names sizes that can.
    """
    classes, per_class = config.classes_per_batch, config.images_per_class
    chunk, images = config.gradient_cache_chunk, classes * per_class
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
            f"train.gradient_cache_chunk={chunk} must divide the batch of {images} images and "
            f"be a multiple of the {devices} devices: {', '.join(['0', *fitting])} are."
        )


def check_options(config: ConfigDict, dataset: Dataset) -> None:
    """Checks that the inference options of a config fit into the data set.

    Raises:
      ConfigError: One asks for more neighbours or dimensions than there are; it says how many.
    """
    wanted, model = config.eval, config.model
    queries = len(dataset.query.labels)
    items = queries if dataset.gallery is None else len(dataset.gallery.labels)
    searched = items - (dataset.gallery is None)  # a query does not find itself
    most = {"query_expansion": searched, "database_augmentation": items - 1}
    most["whitening_dim"] = len(dataset.train.labels) - 1
    if wanted.vector == "embedding":
        most["whitening_dim"] = min(most["whitening_dim"], model.embedding_dim)
    for key, number in most.items():
        if wanted[key] > number:
            what = "dimensions" if key == "whitening_dim" else "neighbours"
            raise ConfigError(
                f"eval.{key}={wanted[key]} asks for more {what} than this data set has; at most "
                f"{number} can be used."
            )


def load_pretrained(config: ConfigDict, state: State) -> State:
    """Puts published weights, or those of an earlier run, into a state at step 0.

    Args:
      config: the `model` part of an experiment's config. `pretrained` is the folder of a run,
        whose best checkpoint is taken, or what `pretrained.load` knows.
      state: from `create_state`.

    Returns:
      The state with the weights, laid over the devices as before.

    Raises:
      ConfigError: There is no such source, or it does not fit the network.
    """
    variables = {"params": network_params(state.params), "batch_stats": state.batch_stats}
    source = config.pretrained
    run = Path(source).expanduser()
    try:
        if (run / checkpoint.FOLDER).is_dir():
            weights, normalization, _ = checkpoint.read_weights(run)
            loaded = pretrained.fill(variables, weights)
        else:
            loaded, normalization = pretrained.load(variables, source, config.backbone)
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(f"model.pretrained: {error}") from error
    params = {**state.params, **loaded["params"]}  # those of the losses stay
    new = dataclasses.replace(
        state,
        params=params,
        batch_stats=loaded["batch_stats"],
        normalization=normalization,
        average=None if state.average is None else params,
    )
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), new, state)


def open_data(config: ConfigDict) -> tuple[Dataset, np.ndarray]:
    """Opens the data set of a config, building it first if need be.

    Returns:
      The data set; the labels [N] int32 of its training images, in [0, M).

    Raises:
      ConfigError: Something is wrong with the source, the data set or the disk.
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
