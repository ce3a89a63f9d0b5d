"""Training from start to end: read `train_and_evaluate`, then `train`."""

import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from cgd_jax import checkpoint
from cgd_jax.config import to_dict
from cgd_jax.data import Dataset
from cgd_jax.data.batches import batch_positions, make_batches, prefetch
from cgd_jax.evaluate import (
    evaluate_checkpoint,
    evaluate_step,
    log_results,
    measure_baselines,
)
from cgd_jax.from_config import Setup, load_pretrained, name_backbone, set_up
from cgd_jax.models.cgd import network_params
from cgd_jax.objective import triplet_margin
from cgd_jax.reports import collapse, plots, tables, trackers
from cgd_jax.reports.history import History, Progress
from cgd_jax.reports.throughput import Meter, flops_per_image, peak_flops
from cgd_jax.runtime import console, files, interrupts, locks, processes
from cgd_jax.runtime.errors import UserError
from cgd_jax.train_step import State, make_train_step
from cgd_jax.workdir import (
    check_data,
    check_workdir,
    count_classes,
    keep_compiled,
    record_data,
)


class Diverged(UserError):
    """Training that cannot go on; the message is for the person who started it."""


def train_and_evaluate(config: ConfigDict, workdir: str) -> dict:
    """Trains what a config describes, or goes on with it, and evaluates the best.

    The work folder then holds config.json, history.csv, curves.png, retrievals.png,
    results.json, the checkpoints and TensorBoard events.

    Args:
      config: see configs/base.py.
      workdir: folder of the run; one with checkpoints of the same config is resumed.

    Returns:
      What results.json holds.

    Raises:
      ConfigError: The config cannot be run, or the work folder holds a run of another one.
      BlockingIOError: Another process trains in that folder.
      Diverged: The loss was not finite.
      SystemExit: SIGINT or SIGTERM ended it; the status is `interrupts.EXIT_TEMPFAIL`.
    """
    started = time.time()
    config = name_backbone(config)
    check_workdir(config, workdir)
    keep_compiled(workdir)
    setup = set_up(config)
    with (
        locks.one_run_in(workdir),
        checkpoint.manager(workdir, config.train.keep) as checkpoints,
    ):
        check_data(workdir, setup.dataset)
        saved = checkpoint.restore_latest(checkpoints, setup.state)
        if config.model.pretrained and not (saved and Path(workdir, "baselines.json").exists()):
            setup = setup._replace(state=load_pretrained(config.model, setup.state))
        folder = processes.report_folder(workdir)
        files.write_json(folder / "config.json", to_dict(config))
        if saved is None:  # else it is not known what a run without data.json was trained on
            record_data(folder, setup.dataset)
        console.log(tables.dataset_table(setup.dataset) + "\n")
        flops = flops_per_image(setup.model, setup.state, config.data.image_size)
        console.log(tables.run_table(run_facts(config, workdir, setup, flops)) + "\n")
        baselines = {}
        if config.eval.baselines:
            baselines = measure_baselines(config, workdir, folder, setup)
        if saved:
            console.log(f"Resumed from the checkpoint of step {int(saved.step)}.")
        state = saved or setup.state
        with (
            trackers.tracking(config.train.tracker, folder, to_dict(config)) as track,
            History(folder, int(state.step), track) as history,
        ):
            state, stopped = train(
                config, folder, setup, state, flops, checkpoints, history, started
            )
        margin, classes = triplet_margin(config.loss), count_classes(workdir, setup.dataset)
        seen = tables.describe_classes(*classes.values())
        with files.warn_on_write_error("curves.png"):
            plots.plot_curves(folder / "curves.png", history.rows, baselines, margin, seen)
        for warning in collapse.warnings(history.rows, margin, config.model.center):
            console.log(f"Warning: {warning}")
        if stopped:
            console.log(
                f"Stopped at step {int(state.step)} of {config.train.steps}; the same command goes "
                f"on from the checkpoint of step {checkpoints.latest_step()} in {workdir}."
            )
            raise SystemExit(interrupts.EXIT_TEMPFAIL)
        result = evaluate_checkpoint(config, workdir, folder, setup, None, "")
        results = {**result, "baselines": baselines}
        files.write_json(folder / "results.json", results)
    log_results(config, results)
    took = console.duration(time.time() - started)
    console.log(f"\n{took} in all. Look at curves.png and retrievals.png in {workdir}.")
    return results


def train(
    config: ConfigDict,
    folder: Path,
    setup: Setup,
    state: State,
    flops: float,
    checkpoints: ocp.CheckpointManager,
    history: History,
    started: float,
) -> tuple[State, bool]:
    """Trains from a state to the last step, or until a signal comes.

    Args:
      config: a whole experiment's.
      folder: where reports are written.
      setup: what `set_up` made of the config.
      state: where to begin; its buffers are donated to the first step.
      flops: floating-point operations of a forward pass for one image.
      checkpoints: from `checkpoint.manager`; the last state is among them at the end.
      history: gets a row whenever something is logged or evaluated.
      started: when the program started, in seconds since the epoch; the time to the first
        step is printed.

    Returns:
      The last state; whether a signal ended training early.

    Raises:
      Diverged: The loss was not finite.
    """
    first, steps = int(state.step), config.train.steps
    batch_size = config.train.classes_per_batch * config.train.images_per_class
    choose = batch_positions(config, setup.labels)
    rows = processes.local_rows(setup.batch_sharding, batch_size)
    make_batch = make_batches(choose, setup.dataset, setup.labels, rows)
    batches = prefetch(make_batch, range(first, steps), setup.batch_sharding)
    train_step = make_train_step(config, setup.model, setup.optimizer, setup.mesh)
    # A backward pass costs two forward ones.
    meter = Meter(batch_size, 3 * flops * batch_size, peak_flops(config.model.dtype))
    metrics, unlogged, stop = None, [], False
    stop_together = processes.stop_together(setup.batch_sharding)
    due = lambda step, every: step % every == 0 or step == steps
    with interrupts.stop_signals() as stopped_by, Progress(first, steps) as progress:
        if first and due(first, config.train.eval_every) and checkpoints.metrics(first) is None:
            # A signal came while this step was evaluated.
            recalls = evaluate_step(config, setup, state, stopped_by)
            if not recalls:
                return state, True
            history.add(first, recalls)
            checkpoint.save(checkpoints, state, recalls["recall@1"])
        for step in range(first + 1, steps + 1):
            with meter.waiting():
                batch = next(batches)
            profile(config.profile_steps, first, step, folder, metrics)
            previous = metrics
            state, metrics = train_step(state, *batch)
            # One step is in flight while the host waits for the previous one: the device is
            # never idle, and no more than one step is left to finish when a signal comes.
            jax.block_until_ready(previous)
            stop_if_not_finite(config, folder, setup.dataset, choose, step - 1, previous)
            unlogged.append(metrics)
            meter.count()
            progress.update()
            if step == first + 1:
                jax.block_until_ready(metrics)
                console.log(f"First step after {console.duration(time.time() - started)}.")
                meter.restart()

            row, recalls = {}, {}
            if due(step, config.train.log_every):
                stop_if_not_finite(config, folder, setup.dataset, choose, step, metrics)
                row = {name: float(np.nanmean([m[name] for m in unlogged])) for name in metrics}
                row |= meter.read()
                unlogged = []
                history.add(step, row)
            if due(step, config.train.eval_every):
                recalls = evaluate_step(config, setup, state, stopped_by)
                history.add(step, recalls)
                meter.restart()
            if row or recalls:
                progress.log(step, row | recalls)
            stop = stop_together(bool(stopped_by))
            if stop or recalls or step % config.train.checkpoint_every == 0:
                # Not saved: a resumed run would skip this step without a word.
                stop_if_not_finite(config, folder, setup.dataset, choose, step, metrics)
                checkpoint.save(checkpoints, state, recalls.get("recall@1"))
            if stop:
                break
        batches.close()
        checkpoint.finish(checkpoints)
    return state, stop


def profile(profile_steps: str, first: int, step: int, folder: Path, metrics) -> None:
    """Starts or ends the profiler's trace before a step.

    Args:
      profile_steps: "10:15" traces the steps 10 to 14; "" none.
      first: steps done when this process started; one resumed within the trace makes none.
      step: the step that comes next.
      folder: the trace goes to `profile` below it.
      metrics: of the previous step, which is waited for.
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


def stop_if_not_finite(
    config: ConfigDict, folder: Path, dataset: Dataset, choose, step: int, metrics: dict | None
) -> None:
    """Ends a run after more than `train.skip_nonfinite` steps in a row without a finite loss.

    The metrics and the images of the step are written to nonfinite.json first.

    Args:
      config: a whole experiment's.
      folder: where nonfinite.json is written.
      dataset: the data set that is trained on.
      choose: step → positions of a batch, from `batch_positions`.
      step: the step of the metrics, from 1.
      metrics: of the step; None before the first.

    Raises:
      Diverged: The message says what to look at.
    """
    if metrics is None or int(metrics["skipped"]) <= config.train.skip_nonfinite:
        return
    images = [dataset.train.ids[i] for i in choose(step - 1)]
    values = {name: str(float(value)) for name, value in metrics.items()}
    files.write_json(folder / "nonfinite.json", {"step": step, "metrics": values, "images": images})
    raise Diverged(
        f"The loss or its gradient is not finite at step {step}. nonfinite.json in {folder} names "
        f"the images of the batch; no checkpoint holds such a step. Lower the learning rate, or "
        f"pass over up to n such steps in a row with --config.train.skip_nonfinite=n."
    )


def run_facts(config: ConfigDict, workdir: str, setup: Setup, flops: float) -> dict[str, str]:
    """Returns the facts of a run that are printed before it begins."""
    parameters = sum(array.size for array in jax.tree.leaves(network_params(setup.state.params)))
    train = config.train
    images = train.classes_per_batch * train.images_per_class
    devices = jax.devices()
    return {
        "devices": f"{len(devices)} × {devices[0].device_kind}",
        "network": f"{config.model.backbone}, descriptors "
        f"{config.model.descriptors}, embedding {config.model.embedding_dim}",
        "parameters": console.quantity(parameters),
        "FLOPs per image": console.quantity(flops),
        "batch": f"{train.classes_per_batch} classes × {train.images_per_class} images = {images}",
        "steps": f"{train.steps:,}",
        "work folder": workdir,
    }
