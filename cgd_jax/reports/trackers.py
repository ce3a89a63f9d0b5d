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
from typing import Any

from cgd_jax.config import flatten
from cgd_jax.runtime import console, files, processes
from cgd_jax.runtime.errors import ConfigError

__all__ = ["TRACKERS", "tracking"]

log = logging.getLogger(__name__)

Track = Callable[[int, dict[str, float]], object]

PROJECT = "cgd_jax"  # unless the environment names another


@contextlib.contextmanager
def _wandb(name: str, identity: str | None, config: dict, folder: Path) -> Iterator[tuple]:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=name,
        id=identity,
        resume="allow",
        config=config,
        dir=folder,
        settings=wandb.Settings(silent=True, console="off"),
    )
    done = run.step  # a resumed run has the rows up to here, and takes none before it

    def track(step: int, values: dict[str, float]) -> None:
        if step >= done:
            run.log(values, step=step)

    with run:
        # Asked for the address of an offline run, wandb warns.
        yield run.id, f"{run.dir}, offline" if run.offline else run.url, track


@contextlib.contextmanager
def _mlflow(name: str, identity: str | None, config: dict, folder: Path) -> Iterator[tuple]:
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # else it tells how it makes its tables
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))

    def track(step: int, values: dict[str, float]) -> None:
        # MLflow takes no @ in a name.
        named = {key.replace("@", "_at_"): value for key, value in values.items()}
        mlflow.log_metrics(named, step=step)

    with mlflow.start_run(run_id=identity, run_name=None if identity else name) as run:
        if identity is None:
            mlflow.log_params(flatten(config))
        yield run.info.run_id, mlflow.get_tracking_uri(), track


# Each opens a tracker's run, new or known by its identity, and yields its identity, where it is
# seen, and what logs a row.
TRACKERS = {"wandb": _wandb, "mlflow": _mlflow}


@contextlib.contextmanager
def tracking(tracker: str, folder: Path, config: dict[str, Any]) -> Iterator[Track]:
    """Opens the run of a tracker, or goes on with it.

    Args:
      tracker: a name in `TRACKERS`, or "" for none.
      folder: of the run; tracker.json in it keeps by what name the tracker knows the run.
      config: of the run, nested.

    Yields:
      A function that logs the values of a step. Training goes on if it fails.

    Raises:
      ConfigError: The tracker does not take the run: nobody has logged in, for example.
    """
    if not tracker or not processes.is_first():
        yield lambda step, values: None
        return
    path = folder / "tracker.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    with contextlib.ExitStack() as stack:
        try:
            opened = TRACKERS[tracker](folder.name, known.get(tracker), config, folder)
            identity, place, track = stack.enter_context(opened)
        except Exception as error:  # each library has its own
            text = " ".join(str(error).split()).rstrip(".")
            raise ConfigError(
                f"train.tracker={tracker!r} does not take the run: {text}. Set it up, or leave it "
                f"out; history.csv and TensorBoard's events are written in any case."
            ) from error
        files.write_json(path, known | {tracker: identity})
        console.log(f"The history is also in {tracker}: {place}\n")

        def track_if_possible(step: int, values: dict[str, float]) -> None:
            try:
                track(step, values)
            except Exception as error:
                text = " ".join(str(error).split())[:300]
                log.warning("%s did not take the row of step %d: %s", tracker, step, text)

        yield track_if_possible
