"""The work folder of a run: its name, its config, what it was trained on."""

import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from cgd_jax import checkpoint, data
from cgd_jax.config import differences, from_dict, to_dict
from cgd_jax.data import Dataset
from cgd_jax.runtime import files
from cgd_jax.runtime.errors import ConfigError

__all__ = [
    "check_data",
    "check_workdir",
    "count_classes",
    "data_changes",
    "default_workdir",
    "read_config",
    "record_data",
]

DATA = "data.json"  # what the run is trained on, see `data.fingerprint`


def default_workdir(config_argument: str, parent: str = "runs") -> str:
    """Returns the folder of a run that names none: configs/glyphs.py:SMG → runs/glyphs-SMG."""
    path, _, argument = config_argument.partition(":")
    return str(Path(parent, "-".join(filter(None, [Path(path).stem, argument]))))


def read_config(workdir: str | Path) -> ConfigDict:
    """Reads the config of a run; keys that are newer than the run are filled in.

    Raises:
      FileNotFoundError: There is no run.
      ConfigError: Its config.json is damaged.
    """
    path = Path(workdir, "config.json")
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"There is no run in {workdir}: it has no config.json. Give the folder of a run with "
            f"--workdir=, or train one first."
        ) from None
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: {error}.") from error


def check_workdir(config: ConfigDict, workdir: str | Path) -> None:
    """Refuses a work folder that holds a run of another config, or cannot hold one.

    Raises:
      ConfigError: Names every difference; or as `checkpoint.check_folder`.
    """
    checkpoint.check_folder(workdir)
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


def record_data(folder: Path, dataset: Dataset) -> None:
    """Writes down what the data set of a run holds, unless that stands there already."""
    if not Path(folder, DATA).exists():
        files.write_json(folder / DATA, data.fingerprint(dataset))


def data_changes(workdir: str | Path, dataset: Dataset) -> list[str]:
    """Says how a data set differs from the one that a run was trained on, line by line."""
    recorded = _recorded_data(workdir)
    return data.describe_difference(recorded, data.fingerprint(dataset)) if recorded else []


def check_data(workdir: str | Path, dataset: Dataset) -> None:
    """Refuses to go on with a run on another data set than it began with.

    Raises:
      ConfigError: Names every difference.
    """
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
    recorded = _recorded_data(workdir)
    if recorded and data_changes(workdir, dataset):  # only the names of classes are comparable
        tested = {dataset.query.class_names[label] for label in tested}
        trained = {name for name, _ in recorded["train"]["per class"]}
    return {"tested": len(tested), "trained on": len(tested & trained)}


def _recorded_data(workdir: str | Path) -> dict | None:
    """Returns what `record_data` wrote; None for a run of a version that did not."""
    path = Path(workdir, DATA)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
