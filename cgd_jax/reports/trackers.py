"""Experiment trackers that show the history of a run beside TensorBoard: W&B and MLflow.

Where they send it, and to whom, is set as their own documentation says: `wandb login` and
WANDB_PROJECT, MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from flax.traverse_util import flatten_dict

from cgd_jax.runtime import console, files, processes
from cgd_jax.runtime.errors import ConfigError

log = logging.getLogger(__name__)


def _wandb(identity: str | None, config: dict, folder: Path) -> tuple:
    import wandb

    project = os.environ.get("WANDB_PROJECT", "cgd_jax")
    known = {"project": project, "name": folder.name, "id": identity, "resume": "allow"}
    settings = wandb.Settings(silent=True, console="off")
    run = wandb.init(**known, config=config, dir=folder, settings=settings)
    # Rows that a resumed run has already are ignored.
    return run, run.id, lambda step, values: run.log(values, step=step)


def _mlflow(identity: str | None, config: dict, folder: Path) -> tuple:
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # else it tells how it makes its tables
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "cgd_jax"))
    run = mlflow.start_run(run_id=identity, run_name=None if identity else folder.name)
    if identity is None:
        mlflow.log_params(flatten_dict(config, sep="."))
    named = lambda values: {key.replace("@", "_at_"): x for key, x in values.items()}  # takes no @
    return run, run.info.run_id, lambda step, x: mlflow.log_metrics(named(x), step=step)


# Each opens a run, new or known by its identity: it, its identity, and what logs a row.
TRACKERS = {"wandb": _wandb, "mlflow": _mlflow}


@contextlib.contextmanager
def tracking(
    tracker: str, folder: Path, config: dict
) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Opens the run of a tracker, or goes on with it; yields what logs the values of a step.

    tracker.json in the run's folder keeps by what name the tracker knows it. Training goes on if
    logging fails. Raises ConfigError if the tracker does not take the run.
    """
    if not tracker or not processes.is_first():
        yield lambda step, values: None
        return
    path = folder / "tracker.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    try:
        run, identity, track = TRACKERS[tracker](known.get(tracker), config, folder)
    except Exception as error:  # each library has its own
        raise ConfigError(
            f"train.tracker={tracker!r} does not take the run: {error}. Set it up, or leave it "
            f"out; history.csv and TensorBoard's events are written in any case."
        ) from error

    def track_if_possible(step: int, values: dict[str, float]) -> None:
        try:
            track(step, values)
        except Exception as error:
            log.warning("%s did not take the row of step %d: %s", tracker, step, error)

    with run:
        files.write_json(path, known | {tracker: identity})
        console.log(f"The history is also in {tracker}, as run {identity}.\n")
        yield track_if_possible
