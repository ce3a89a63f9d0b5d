"""Training from start to end: read `train_and_evaluate`, then `train`."""

import contextlib
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from cgd_jax import checkpoint, gradient_caching, train_step
from cgd_jax.config import to_dict
from cgd_jax.data.batches import batch_positions, make_batches, prefetch
from cgd_jax.evaluation.baselines import measure_baselines
from cgd_jax.evaluation.evaluate import (
    count_parameters,
    embed_test,
    evaluate_state,
    evaluate_step,
    measure,
)
from cgd_jax.objective import triplet_margin
from cgd_jax.reports import collapse, plots, tables, trackers
from cgd_jax.reports.history import History, Progress
from cgd_jax.reports.summary import log_results
from cgd_jax.reports.throughput import Meter, flops_per_image, peak_flops
from cgd_jax.run import Run, create_run, initial_state
from cgd_jax.runtime import console, files, interrupts, locks, processes
from cgd_jax.runtime.errors import UserError
from cgd_jax.train_step import State
from cgd_jax.workdir import check_data, count_classes, record_data


class Diverged(UserError):
    """Training that cannot go on."""


def train_and_evaluate(config: ConfigDict, workdir: str) -> dict:
    """Trains what a config describes, or goes on with it, and evaluates the chosen checkpoint.

    The work folder then holds config.json, history.csv, curves.png, retrievals.png, results.json,
    the checkpoints and TensorBoard events. Returns what results.json holds.

    Raises:
      ConfigError: The config cannot be run, or the work folder holds a run of another one.
      BlockingIOError: Another process trains in that folder.
      Diverged: The loss was not finite.
      SystemExit: SIGINT, SIGTERM or SIGHUP ended it; the status is `interrupts.EXIT_TEMPFAIL`.
    """
    started = time.time()
    run = create_run(config, workdir)
    config, folder = run.config, run.folder
    with locks.one_run_in(workdir), checkpoint.manager(workdir, config.train.keep) as checkpoints:
        check_data(workdir, run.dataset)
        state = checkpoint.restore_latest(checkpoints, run.state_shapes())
        resumed = state is not None
        state = state if resumed else initial_state(run)
        files.write_json(folder / "config.json", to_dict(config))
        if not resumed:  # else it is not known what a run without data.json was trained on
            record_data(folder, run.dataset)
        variables, size = state.variables(), config.data.crop_size or config.data.image_size
        flops = flops_per_image(run.model, variables, state.normalization, size)
        console.log(tables.dataset_table(run.dataset) + "\n")
        console.log(tables.run_table(run_facts(run, state, flops)) + "\n")
        if resumed:
            console.log(f"Resumed from the checkpoint of step {int(state.step)}.")
        images = batch_size(config)
        # A backward pass costs two forward ones.
        meter = Meter(images, 3 * flops * images, peak_flops(config.model.dtype), started)
        with (
            trackers.tracking(config.train.tracker, folder, to_dict(config)) as track,
            History(folder, int(state.step), track) as history,
        ):
            state, stopped = train(run, state, checkpoints, meter, history)
        baselines = measure_baselines(run) if config.eval.baselines and not stopped else {}
        report_history(run, history, baselines)
        if stopped:
            console.log(
                f"Stopped at step {int(state.step)} of {config.train.steps}; the same command goes "
                f"on from the checkpoint of step {checkpoints.latest_step()} in {workdir}."
            )
            raise SystemExit(interrupts.EXIT_TEMPFAIL)
        results = measure_chosen(run, state, checkpoints, history) | {"baselines": baselines}
        files.write_json(folder / "results.json", results)
    log_results(config, results)
    took = console.duration(time.time() - started)
    console.log(f"\n{took} in all. Look at curves.png and retrievals.png in {workdir}.")
    return results


def train(
    run: Run, state: State, checkpoints: ocp.CheckpointManager, meter: Meter, history: History
) -> tuple[State, bool]:
    """Trains from a state, whose buffers are donated, to the last step, or until a signal comes.

    Returns the last state, which is among the checkpoints then, and whether a signal came. Raises
    Diverged if the loss is not finite.
    """
    config, first, steps = run.config, int(state.step), run.config.train.steps
    sample_indices = batch_positions(config, run.labels)
    rows = processes.local_rows(run.batch_sharding, batch_size(config))
    make_batch = make_batches(sample_indices, run.dataset, run.labels, rows)
    cached = config.train.gradient_cache_chunk > 0
    make_train_step = (gradient_caching if cached else train_step).make_train_step
    step_once = make_train_step(config, run.model, run.optimizer, run.mesh)
    stop_together = processes.stop_together(run.batch_sharding)
    metrics, unlogged, stop = None, [], False

    def due(step: int, every: int) -> bool:
        return step % every == 0 or step == steps

    with (
        interrupts.stop_signals() as stopped_by,
        contextlib.closing(
            prefetch(make_batch, range(first, steps), run.batch_sharding)
        ) as batches,
        Progress(first, steps) as progress,
    ):
        if first and due(first, config.train.eval_every) and checkpoints.metrics(first) is None:
            # A signal came while this step was evaluated.
            recalls = evaluate_step(run, state, stopped_by)
            if not recalls:
                return state, True
            history.add(first, recalls)
            checkpoint.save(checkpoints, state, score_of(run, first, recalls))
        if out_of_patience(config, history):
            return state, False
        for step in range(first + 1, steps + 1):
            with meter.waiting():
                batch = next(batches)
            profile(config.profile_steps, first, step, run.folder, metrics)
            previous, (state, metrics) = metrics, step_once(state, *batch)
            unlogged.append(metrics)
            meter.count()
            progress.update()

            # One step is in flight while the host waits for the one before: the device is never
            # idle, and no more than one step is left to finish when a signal comes.
            jax.block_until_ready(previous)
            stop = stop_together(bool(stopped_by))
            logs, evaluates = due(step, config.train.log_every), due(step, config.train.eval_every)
            saves = stop or evaluates or step % config.train.checkpoint_every == 0
            if previous is not None:
                stop_if_not_finite(run, sample_indices, step - 1, previous)
            # What is logged, evaluated or saved is waited for: a run that was resumed from a step
            # that is not finite would skip it without a word.
            if logs or saves or step == first + 1:
                stop_if_not_finite(run, sample_indices, step, metrics)
            if step == first + 1:
                meter.first_step()

            row, recalls = {}, {}
            if logs:
                row = {name: float(np.nanmean([m[name] for m in unlogged])) for name in metrics}
                row |= meter.read()
                unlogged = []
            if evaluates and not stop:
                recalls = evaluate_step(run, state, stopped_by)
                stop = not recalls
                meter.restart()
            if row or recalls:
                history.add(step, row | recalls)
                progress.log(step, row | recalls)
            if saves:
                checkpoint.save(checkpoints, state, score_of(run, step, recalls))
            if stop or (recalls and out_of_patience(config, history)):
                break
        checkpoint.finish(checkpoints)
    return state, stop


def score_of(run: Run, step: int, recalls: dict[str, float]) -> float | None:
    """Returns what the checkpoint of a step is chosen by, see `checkpoint.save`."""
    if not recalls:
        return None
    by_recall = run.validation is not None or run.config.train.best_of_test
    return recalls["recall@1"] if by_recall else float(step)


def out_of_patience(config: ConfigDict, history: History) -> bool:
    """Returns whether the last `train.patience` evaluations brought nothing better."""
    values = [row["recall@1"] for row in history.rows if "recall@1" in row]
    if not config.train.patience or not values:
        return False
    return len(values) - 1 - int(np.argmax(values)) >= config.train.patience


def measure_chosen(
    run: Run, last: State, checkpoints: ocp.CheckpointManager, history: History
) -> dict:
    """Measures the chosen checkpoint on the test classes, and beside it the last step.

    Returns what `evaluate_state` does, with "chosen by", and if they are there "validation", the
    recalls of the validation classes at that step, and "last step", its "step" and "metrics".
    """
    state = checkpoint.restore(checkpoints, run.state_shapes())
    results, chosen = evaluate_state(run, state), int(state.step)
    results["chosen by"] = "test classes" if run.config.train.best_of_test else "last step"
    if run.validation is not None:
        (row,) = [row for row in history.rows if row["step"] == chosen]
        results["chosen by"] = "validation classes"
        results["validation"] = {k: v for k, v in row.items() if k.startswith("recall@")}
    if chosen != int(last.step):
        measured = measure(run, embed_test(run, last))
        results["last step"] = {"step": int(last.step), "metrics": measured}
    return results


def batch_size(config: ConfigDict) -> int:
    return config.train.classes_per_batch * config.train.images_per_class


def profile(profile_steps: str, first: int, step: int, folder: Path, metrics) -> None:
    """Starts or ends the profiler's trace before a step; "10:15" traces the steps 10 to 14.

    `first` steps were done when this process started: one that was resumed within the trace makes
    none. `metrics` are those of the previous step, which is waited for.
    """
    if not profile_steps:
        return
    begin, end = map(int, profile_steps.split(":"))
    if first >= begin:
        return
    if step == begin:
        jax.block_until_ready(metrics)
        jax.profiler.start_trace(str(folder / "profile"))
    if step == end:
        jax.block_until_ready(metrics)
        jax.profiler.stop_trace()
        console.log(f"Look at the profile: tensorboard --logdir={folder / 'profile'}")


def stop_if_not_finite(run: Run, sample_indices, step: int, metrics: dict) -> None:
    """Waits for a step, and ends a run after `train.skip_nonfinite` steps without a finite loss.

    The metrics and the images of the step are written to nonfinite.json before Diverged is raised.
    """
    if int(metrics["skipped"]) <= run.config.train.skip_nonfinite:
        return
    images = [run.dataset.train.ids[i] for i in sample_indices(step - 1)]
    values = {name: str(float(value)) for name, value in metrics.items()}
    found = {"step": step, "metrics": values, "images": images}
    files.write_json(run.folder / "nonfinite.json", found)
    raise Diverged(
        f"The loss or its gradient is not finite at step {step}. nonfinite.json in {run.folder} "
        f"names the images of the batch; no checkpoint holds such a step. Lower the learning rate, "
        f"or pass over up to n such steps in a row with --config.train.skip_nonfinite=n."
    )


def run_facts(run: Run, state: State, flops: float) -> dict[str, str]:
    model, train = run.config.model, run.config.train
    devices = jax.devices()
    return {
        "devices": f"{len(devices)} × {devices[0].device_kind}",
        "network": f"{model.backbone}, descriptors {model.descriptors}, embedding "
        f"{model.embedding_dim}",
        "parameters": console.quantity(count_parameters(state)),
        "FLOPs per image": console.quantity(flops),
        "batch": f"{train.classes_per_batch} classes × {train.images_per_class} images = "
        f"{batch_size(run.config)}",
        "steps": f"{train.steps:,}",
        "work folder": run.workdir,
    }


def report_history(run: Run, history: History, baselines: dict) -> None:
    """Draws the curves of a run, and warns of what they show."""
    margin = triplet_margin(run.config.loss)
    if run.validation is None:
        classes = tables.describe_classes(*count_classes(run.workdir, run.dataset).values())
    else:
        classes = f"{len(np.unique(run.validation.query.labels))} validation classes"
    with files.warn_on_write_error("curves.png"):
        plots.plot_curves(run.folder / "curves.png", history.rows, baselines, margin, classes)
    if history.rows and history.rows[-1]["step"] >= run.config.train.steps / 2:  # else it is early
        for warning in collapse.warnings(history.rows, margin, run.config.model.center):
            console.log(f"Warning: {warning}")
