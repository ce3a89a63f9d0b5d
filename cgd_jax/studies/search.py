"""Settings searched for on validation classes, by Optuna; the test classes are never measured."""

import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import optuna
from ml_collections import ConfigDict

from cgd_jax import checkpoint
from cgd_jax.reports.history import History
from cgd_jax.reports.throughput import Meter
from cgd_jax.rules import validate
from cgd_jax.run import create_run, initial_state, open_data
from cgd_jax.runtime import console, interrupts
from cgd_jax.runtime.errors import ConfigError
from cgd_jax.study_files import Study
from cgd_jax.train import Diverged, batch_size, train

PLOTS = ("optimization_history", "intermediate_values", "param_importances", "slice")


def run_search(study: Study, config: ConfigDict, workdir: str) -> None:
    """Trains until a study's number of trials is finished; search.db in `workdir` has them all.

    The same command goes on, and several at once share the trials. Without validation classes that
    is a ConfigError.
    """
    if open_data(config)[1] is None:
        raise ConfigError(
            "A search chooses on validation classes, and the config has none: set "
            "--data.validation_fraction=0.25, for example."
        )
    folder = Path(workdir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{folder / 'search.db'}",
        heartbeat_interval=30,  # trials of a process that was killed are tried again
        heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
    )
    sampler = optuna.samplers.TPESampler(seed=config.seed)
    search = optuna.create_study(
        storage=storage, sampler=sampler, study_name=study.name, direction="maximize",
        load_if_exists=True,
    )  # fmt: skip

    def objective(trial: optuna.Trial) -> float:
        values = {
            key: trial.suggest_categorical(key, span)
            if isinstance(span, list)
            else trial.suggest_float(key, *span, log=True)
            for key, span in study.space.items()
        }
        return train_trial(trial, config, values, folder / f"trial-{trial.number}")

    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    until = optuna.study.MaxTrialsCallback(study.trials, states)
    if len(search.get_trials(deepcopy=False, states=states)) < study.trials:
        search.optimize(objective, callbacks=[until])
    for name in PLOTS:
        axes = getattr(optuna.visualization.matplotlib, f"plot_{name}")(search)
        np.ravel(axes)[0].figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
    flags = " ".join(f"--{key}={value}" for key, value in search.best_params.items())
    console.log(
        f"Best of {len(search.trials)} trials, R@1 {100 * search.best_value:.2f} % of the "
        f"validation classes:\n{flags}\nLook at the figures in {workdir}."
    )


def train_trial(trial: optuna.Trial, config: ConfigDict, values: dict, folder: Path) -> float:
    """Trains with some values, and returns the best R@1 of the validation classes.

    Raises TrialPruned if others were better at the same step, or if the loss is not finite.
    """
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(values)
    validate(config)
    run = create_run(config, str(folder))
    folder.mkdir(exist_ok=True)

    def report(step: int, row: dict[str, float]) -> None:
        if "recall@1" in row:
            trial.report(row["recall@1"], step)
            if trial.should_prune() and step < config.train.steps:
                raise optuna.TrialPruned

    meter = Meter(batch_size(config), float("nan"), float("nan"), time.time())
    try:
        with checkpoint.manager(str(folder), 1) as kept, History(folder, 0, report) as history:
            _, stopped = train(run, initial_state(run), kept, meter, history)
    except Diverged as error:
        raise optuna.TrialPruned from error
    finally:
        shutil.rmtree(folder / checkpoint.FOLDER, ignore_errors=True)
    if stopped:
        raise SystemExit(interrupts.EXIT_TEMPFAIL)
    return max(row["recall@1"] for row in history.rows if "recall@1" in row)
