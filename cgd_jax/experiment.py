"""What a config becomes: the data set, the network, its state, the batches."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict, FrozenConfigDict

from cgd_jax import processes, report
from cgd_jax.augment import IMAGENET, augment
from cgd_jax.config import ConfigError, differences, to_dict, validate
from cgd_jax.datasets import Dataset
from cgd_jax.input_pipeline import class_members, load_dataset, pk_batch
from cgd_jax.models import pretrained
from cgd_jax.models.cgd import CGD, create_model
from cgd_jax.optimizer import make_optimizer
from cgd_jax.train_step import State, create_state, shardings, step_key


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


def batch_positions(config: ConfigDict, labels: np.ndarray):
    """Which training images make up a batch: step, from 0 → positions [B]."""
    members, train = class_members(labels), config.train

    def choose(step: int) -> np.ndarray:
        return pk_batch(members, config.seed, step, train.classes_per_batch, train.images_per_class)

    return choose


def make_batches(choose, dataset: Dataset, labels: np.ndarray, rows=slice(None)):
    """Batches as a function of the step: step → (images [B, S, S, 3] uint8, labels [B]).

    With `rows`, only those positions of the batch.
    """

    def make_batch(step: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = choose(step)[rows]
        return dataset.train.images[chosen], labels[chosen]

    return make_batch


def check_workdir(config: ConfigDict, workdir: str) -> None:
    """Refuses a work folder that holds a run of another config.

    Raises:
      ConfigError: names every difference.
    """
    path = Path(workdir, "config.json")
    if not path.exists():
        return
    changes = differences(json.loads(path.read_text(encoding="utf-8")), to_dict(config))
    if changes:
        listed = "".join(f"\n  {change}" for change in changes)
        raise ConfigError(
            f"{workdir} holds a run with another config. Choose another folder with "
            f"--workdir=, delete this one, or undo the changes:{listed}"
        )


def keep_compiled(workdir: str) -> None:
    """Keeps compiled programs beside the work folders, so that the next run starts sooner."""
    if jax.config.jax_compilation_cache_dir is None:  # else the user has chosen a place
        folder = Path(workdir).resolve().parent / ".compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def show_data(config: ConfigDict, workdir: str) -> None:
    """Builds the data set and its caches, prints its splits, draws what the network will see.

    Args:
      config: of the experiment.
      workdir: where samples.png goes: the images of the first batch after augmentation,
        class by class.

    Raises:
      ConfigError: a config that cannot be run, or data that cannot be used.
    """
    validate(config)
    dataset, labels = open_data(config)
    report.say(report.dataset_table(dataset))
    images, _ = make_batches(batch_positions(config, labels), dataset, labels)(0)
    key = step_key(config.seed, 0)
    images = jax.jit(augment, static_argnums=(2, 3))(
        key, images, FrozenConfigDict(config.augment), config.data.image_size, IMAGENET
    )
    path = Path(workdir, "samples.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    per_class = config.train.images_per_class
    report.plot_samples(path, np.asarray(images), per_class * max(1, 12 // per_class))
    report.say(f"\nLook at {path}: the first batch, {per_class} images of a class side by side.")
