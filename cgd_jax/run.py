"""A run: what a config describes, and where it is kept.

`create_run` opens the data set and makes the network, `initial_state` draws its weights, and
`open_run` is a run of the past at one of its checkpoints.
"""

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from cgd_jax import checkpoint
from cgd_jax.data import Dataset
from cgd_jax.data.load import load_dataset
from cgd_jax.data.shapes import Shape, shapes_around
from cgd_jax.data.validation import hold_out
from cgd_jax.models import pretrained, weight_files
from cgd_jax.models.cgd import CGD, create_model, network_params
from cgd_jax.objective import loss_param_counts
from cgd_jax.optimizer import make_optimizer
from cgd_jax.rules import AUTO, validate
from cgd_jax.runtime import buckets, compiled, console, processes
from cgd_jax.runtime.errors import ConfigError
from cgd_jax.sharding import lay_out, shardings
from cgd_jax.train_step import State, create_state, draw_state
from cgd_jax.workdir import check_workdir, data_changes, read_config


class Run(NamedTuple):
    """All that training, evaluation and explanation start from, but for the weights."""

    config: ConfigDict
    workdir: str
    folder: Path  # where this process writes reports: the work folder in the first process
    dataset: Dataset
    validation: Dataset | None  # of training classes that are held back
    labels: np.ndarray  # [N] int32, of the training images, in [0, M)
    model: CGD
    optimizer: optax.GradientTransformation
    batch_sharding: jax.sharding.NamedSharding  # divides the first axis over all devices

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """All devices."""
        mesh = self.batch_sharding.mesh
        assert isinstance(mesh, jax.sharding.Mesh)  # an abstract one has no devices
        return mesh

    @property
    def shapes(self) -> tuple[Shape, ...] | None:
        """What test images are resized to that keep their aspect; None where they are squares."""
        if self.config.data.aspect == "square":
            return None
        patch = getattr(self.model.backbone, "patch", 1)
        return shapes_around(self.config.data.image_size, patch)

    def create_state(self) -> State:
        """Returns the state at step 0 with random weights; the same config gives the same."""
        return create_state(self.config, self.model, self.optimizer, self.mesh)

    def state_shapes(self) -> State:
        """Returns the shapes, dtypes and shardings of a state."""
        shapes = jax.eval_shape(lambda: draw_state(self.config, self.model, self.optimizer))
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            lay_out(shapes, self.mesh, self.config.train.shard),
        )


def create_run(config: ConfigDict, workdir: str) -> Run:
    """Opens the data set of a config, building it first if need be, and makes its network.

    Raises ConfigError: the config cannot be run, the work folder holds a run of another one, the
    data cannot be used, or a batch does not fit the data or the devices.
    """
    config = name_backbone(config)
    check_workdir(config, workdir)
    compiled.keep_compiled()
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (jax.sharding.AxisType.Auto,))
    if config.train.classes_per_batch:
        check_batch(config.train, mesh.size)
    dataset, validation, labels = open_data(config)
    config = fit_to_data(config, labels, mesh.size, workdir)
    check_options(config, dataset)
    model = create_model(config.model, len(np.unique(labels)))
    proxies = bool(loss_param_counts(config.loss))
    optimizer = make_optimizer(config.optimizer, config.train.steps, model.backbone, proxies)
    folder, (_, batch_sharding) = processes.report_folder(workdir), shardings(mesh)
    return Run(
        config, workdir, folder, dataset, validation, labels, model, optimizer, batch_sharding
    )


def open_run(
    workdir: str, step: int | None = None, config: ConfigDict | None = None
) -> tuple[Run, State]:
    """Opens a run of the past at one of its checkpoints; step None is the chosen one.

    `config` is the run's own, perhaps with another `eval` part. Raises as `create_run`, and
    FileNotFoundError: there is no run in `workdir`, or no such checkpoint.
    """
    config = read_config(workdir) if config is None else config
    run = create_run(config, workdir)
    for change in data_changes(workdir, run.dataset):
        console.log(f"The data set is not the one that the run was trained on: {change}.")
    with checkpoint.manager(workdir) as checkpoints:
        return run, checkpoint.restore(checkpoints, run.state_shapes(), step)


def initial_state(run: Run) -> State:
    """Returns the state at step 0: random weights, or those that `model.pretrained` names."""
    state = run.create_state()
    if run.config.model.pretrained:
        state = load_pretrained(run.config.model, state)
    return state


def name_backbone(config: ConfigDict) -> ConfigDict:
    """Returns a valid config, in which the backbone has its name in the place of "auto"."""
    validate(config)
    if config.model.backbone != AUTO:
        return config
    config = config.copy_and_resolve_references()
    try:
        source = buckets.local(config.model.pretrained)
        config.model.backbone = weight_files.declared_backbone(source)
    except (ValueError, OSError) as error:
        raise ConfigError(f"model.backbone=auto: {error}") from error
    validate(config)
    return config


def check_batch(config: ConfigDict, devices: int) -> None:
    """Checks that a batch of a config's `train`, and every chunk, can be shared out evenly."""
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
    """Refuses inference options that ask for more neighbours or dimensions than there are."""
    wanted, model = config.eval, config.model
    if wanted.complementarity and dataset.query.truth is not None:
        raise ConfigError(
            "eval.complementarity compares branches by classes, and what is right in this data set "
            "is no class."
        )
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

    `pretrained` of a config's `model` is the folder of a run, whose chosen checkpoint is taken, or
    what `pretrained.load` knows. Raises ConfigError if there is no such source, or it does not fit
    the network.
    """
    variables = {"params": network_params(state.params), "batch_stats": state.batch_stats}
    try:
        source = buckets.local(config.pretrained)
        run = Path(source).expanduser()
        if (run / checkpoint.FOLDER).is_dir():
            weight_files.check_backbone(run, config.backbone)
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


def open_data(config: ConfigDict) -> tuple[Dataset, Dataset | None, np.ndarray]:
    """Opens the data set of a config, building it first if need be.

    Returns the data set; its validation classes, if there are any; the labels [N] int32 of its
    training images, in [0, M).
    """
    try:
        # What the first process builds the others find built, if they share its disk.
        if not processes.is_first():
            processes.wait_for_all("the data set is built")
        data = config.data
        dataset = load_dataset(data, config.eval.center_crop)
        dataset, validation = hold_out(
            dataset, data.validation_fraction, data.fold, data.split_seed
        )
        if processes.is_first():
            processes.wait_for_all("the data set is built")
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    _, labels = np.unique(dataset.train.labels, return_inverse=True)
    return dataset, validation, labels.astype(np.int32)


def fit_to_data(
    config: ConfigDict, labels: np.ndarray, devices: int, workdir: str | None = None
) -> ConfigDict:
    """Returns a config in which batch and steps, where they are 0, suit the training images.

    If a run in `workdir` has begun, what it began with counts. Raises ConfigError if there are
    fewer classes than a batch needs; it says what can be done.
    """
    train, classes = config.train, len(np.unique(labels))
    fitted = {}
    if not train.classes_per_batch:
        step = devices // math.gcd(devices, train.images_per_class)
        fitted["classes_per_batch"] = min(classes, 12) // step * step
    batch = fitted.get("classes_per_batch", train.classes_per_batch)
    least = 2 if config.loss.ranking_weight else 1
    if batch < least or batch > classes:
        remedy = (
            f"give --train.classes_per_batch={classes} or less, or 0 for as many as suit"
            if classes >= 2 * least
            else "give more folders, or search with the pretrained network: `cgd_jax serve IMAGES`"
        )
        raise ConfigError(
            f"{config.data.name} has {classes} class{'es' * (classes != 1)} to train on, and a "
            f"batch needs {max(batch, least)}: {remedy}."
        )
    if not train.steps:
        epochs = 15 * len(labels) / (batch * train.images_per_class)
        fitted["steps"] = int(np.clip(round(epochs, -1), 60, 1200))
    if not fitted:
        return config
    if workdir and Path(workdir, "config.json").exists():
        fitted = {key: read_config(workdir).train[key] for key in fitted}
    chosen = ", ".join(f"train.{key}={value}" for key, value in fitted.items())
    console.log(f"Chosen for {len(labels):,} images of {classes} classes: {chosen}.")
    config = config.copy_and_resolve_references()
    config.train.update(fitted)
    validate(config)
    return config
