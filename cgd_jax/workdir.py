"""The work folder of a run: its name, its config, what it was trained on."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from cgd_jax import checkpoint, data
from cgd_jax.config import complete, differences, to_dict
from cgd_jax.data import Dataset
from cgd_jax.rules import check_values
from cgd_jax.runtime import files, processes
from cgd_jax.runtime.errors import ConfigError

PARTS = ("data", "augment", "model", "loss", "optimizer", "train", "eval")  # of a config
DATA = "data.json"  # what the run is trained on, see `data.fingerprint`


def default_workdir(config_argument: str, parent: str = "runs") -> str:
    """Returns the folder of a run that names none: configs/glyphs.py:SMG → runs/glyphs-SMG."""
    path, _, argument = config_argument.partition(":")
    return str(Path(parent, "-".join(filter(None, [Path(path).stem, argument]))))


def read_config(workdir: str | Path) -> ConfigDict:
    """Reads the config of a run; keys that are newer than the run are filled in.

    Raises FileNotFoundError if there is no run, ConfigError if its config.json is damaged.
    """
    path = Path(workdir, "config.json")
    if not path.exists():
        raise FileNotFoundError(
            f"There is no run in {workdir}: it has no config.json. Give the folder of a run with "
            f"--workdir=, or train one first."
        )
    with _reading(path) as values:
        if missing := [p for p in PARTS if not (values.get(p) and isinstance(values[p], dict))]:
            raise ConfigError(f"it has no part {', '.join(missing)}")
        found = complete(values)
        # A data set may be one that only the config file made known.
        check_values(found | {"data.name": "glyphs"})
        return ConfigDict(unflatten_dict(found, sep="."))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Yields what a JSON file holds; whatever goes wrong with it is a ConfigError with its name."""
    try:
        yield json.loads(files.read_regular(path))
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ConfigError(
            f"{path} is damaged: {str(error).rstrip('.')}. Restore it from a backup, or train in "
            f"another folder with --workdir=."
        ) from error


def check_workdir(config: ConfigDict, workdir: str | Path) -> None:
    """Refuses a work folder that holds a run of another config, or cannot hold one."""
    checkpoint.check_folder(workdir)
    if processes.is_first():
        check_writable(workdir)
    if not Path(workdir, "config.json").exists():
        return
    of_run, wanted = read_config(workdir), to_dict(config)
    for key in ("steps", "classes_per_batch"):
        wanted["train"][key] = wanted["train"][key] or of_run.train[key]  # 0 is what it took
    changes = differences(to_dict(of_run), wanted)
    if changes:
        listed = "".join(f"\n  {change}" for change in changes)
        raise ConfigError(
            f"{workdir} holds a run with another config. Choose another folder with "
            f"--workdir=, delete this one, or undo the changes:{listed}"
        )


def check_writable(workdir: str | Path) -> None:
    """Refuses a work folder, or a place for one, in which nothing could be written."""
    for folder in (Path(workdir), Path(workdir, checkpoint.FOLDER)):
        found = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not found.is_dir():
            raise ConfigError(f"--workdir={workdir}: {found} is a file, not a folder.")
        if not os.access(found, os.W_OK | os.X_OK):
            raise ConfigError(
                f"--workdir={workdir}: {found} must not be written to by this user, or its disk is "
                f"read-only. Give the permission (chmod u+rwx), or choose another folder."
            )


def record_data(folder: Path, dataset: Dataset) -> None:
    """Writes down what the data set of a run holds, unless that stands there already."""
    if not Path(folder, DATA).exists():
        files.write_json(folder / DATA, data.fingerprint(dataset))


def data_changes(workdir: str | Path, dataset: Dataset) -> list[str]:
    """Says how a data set differs from the one that a run was trained on, line by line."""
    path = Path(workdir, DATA)
    if not path.exists():  # a run of a version that recorded none
        return []
    with _reading(path) as recorded:
        return data.describe_difference(recorded, data.fingerprint(dataset))


def check_data(workdir: str | Path, dataset: Dataset) -> None:
    """Refuses to go on with a run on another data set than it began with."""
    if changes := data_changes(workdir, dataset):
        listed = "".join(f"\n  {change}" for change in changes)
        raise ConfigError(
            f"The run in {workdir} was trained on another data set than the one that is there now. "
            f"Restore that one, or choose another folder with --workdir=:{listed}"
        )


def count_classes(workdir: str | Path, dataset: Dataset) -> dict[str, int]:
    """Counts the classes that a run is tested on, and how many of them it was trained on."""
    tested = set(np.unique(dataset.query.labels).tolist())
    trained = set(np.unique(dataset.train.labels).tolist())
    if data_changes(workdir, dataset):  # only the names of classes are comparable
        tested = {dataset.query.class_names[label] for label in tested}
        with _reading(Path(workdir, DATA)) as recorded:
            trained = {name for name, _ in recorded["train"]["per class"]}
    return {"tested": len(tested), "trained on": len(tested & trained)}
