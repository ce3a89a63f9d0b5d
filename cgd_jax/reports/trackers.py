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

Track = Callable[[int, dict[str, float]], object]


@contextlib.contextmanager
def _wandb(identity: str | None, config: dict, folder: Path) -> Iterator[tuple[str, Track]]:
    import wandb

    project = os.environ.get("WANDB_PROJECT", "cgd_jax")
    known = {"project": project, "name": folder.name, "id": identity, "resume": "allow"}
    settings = wandb.Settings(silent=True, console="off")
    with wandb.init(**known, config=config, dir=folder, settings=settings) as run:
        # Rows that a resumed run has already are ignored.
        yield run.id, lambda step, values: run.log(values, step=step)


@contextlib.contextmanager
def _mlflow(identity: str | None, config: dict, folder: Path) -> Iterator[tuple[str, Track]]:
    import mlflow

    def track(step: int, values: dict[str, float]) -> None:
        # MLflow takes no @ in a name.
        mlflow.log_metrics({k.replace("@", "_at_"): x for k, x in values.items()}, step=step)

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # else it tells how it makes its tables
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "cgd_jax"))
    with mlflow.start_run(run_id=identity, run_name=None if identity else folder.name) as run:
        if identity is None:
            mlflow.log_params(flatten_dict(config, sep="."))
        yield run.info.run_id, track


# Each opens a run, new or known by its identity, and yields its identity and what logs a row.
TRACKERS = {"wandb": _wandb, "mlflow": _mlflow}


@contextlib.contextmanager
def tracking(tracker: str, folder: Path, config: dict) -> Iterator[Track]:
    """Opens the run of a tracker, or goes on with it; yields what logs the values of a step.

    tracker.json in the run's folder keeps by what name the tracker knows it. Training goes on if
    logging fails. Raises ConfigError if the tracker does not take the run.
    """
    if not tracker or not processes.is_first():
        yield lambda step, values: None
        return
    path = folder / "tracker.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    with contextlib.ExitStack() as stack:
        try:
            opened = TRACKERS[tracker](known.get(tracker), config, folder)
            identity, track = stack.enter_context(opened)
        except Exception as error:  # each library has its own
            raise ConfigError(
                f"train.tracker={tracker!r} does not take the run: {error}. Set it up, or leave it "
                f"out; history.csv and TensorBoard's events are written in any case."
            ) from error
        files.write_json(path, known | {tracker: identity})
        console.log(f"The history is also in {tracker}, as run {identity}.\n")

        def track_if_possible(step: int, values: dict[str, float]) -> None:
            try:
                track(step, values)
            except Exception as error:
                log.warning("%s did not take the row of step %d: %s", tracker, step, error)

        yield track_if_possible
