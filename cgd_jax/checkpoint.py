"""Checkpoints of a run: the latest few and the chosen one, written by orbax.

A save is written under a temporary name and renamed when complete, so that a run
killed in the middle of it finds the checkpoint before.
"""

import dataclasses
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from cgd_jax.models.cgd import network_params
from cgd_jax.preprocess import Normalization
from cgd_jax.runtime import files, processes
from cgd_jax.runtime.errors import ConfigError

FOLDER = "checkpoints"

log = logging.getLogger(__name__)


def check_folder(workdir: str | Path) -> None:
    """Refuses a work folder whose checkpoints could be written, but not read again.

    orbax looks its files up with glob patterns and takes what ends in a colon for the scheme of
    an address, without escaping either in the path that it was given.

    Raises:
      ConfigError: Names the characters.
    """
    path = Path(workdir).resolve()
    odd = sorted({letter for letter in str(path) if letter in "[]*?\\"})
    odd += [part for part in path.parts if part.endswith(":")]
    if odd:
        raise ConfigError(
            f"--workdir={workdir}: checkpoints in {path} could not be read again, because the "
            f"library that writes them takes {' '.join(odd)} in a path for a pattern or an "
            f"address. Choose a folder without."
        )


def manager(workdir: str | Path, keep: int | None = None) -> ocp.CheckpointManager:
    """Opens the checkpoints of a work folder.

    Args:
      workdir: folder of the run.
      keep: how many of the latest checkpoints survive, beside the best; None opens them for
        reading, which is safe while a run writes there.

    Returns:
      An orbax manager; close it, or use it in a `with` statement, to wait for the
      last save.

    Raises:
      ConfigError: As `check_folder`.
    """
    check_folder(workdir)

    def score(metrics):
        return metrics.get("score", metrics.get("recall_at_1"))  # so it was called in 0.1.0

    policies = [
        preservation_policy.LatestN(keep),
        preservation_policy.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False),
    ]
    writing = keep is not None
    options = ocp.CheckpointManagerOptions(
        best_fn=score,
        preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
        create=writing,
        # A killed run may have left an unfinished save.
        cleanup_tmp_directories=writing,
    )
    return ocp.CheckpointManager(
        Path(workdir, FOLDER).resolve(),
        options=options,
        # Explicit: orbax would infer it from the latest checkpoint, which may be damaged.
        item_handlers=ocp.StandardCheckpointHandler(),
    )


def check_step(checkpoints: ocp.CheckpointManager, step: int | None, workdir: str | Path) -> None:
    """Raises FileNotFoundError, with the steps that are kept, if a checkpoint is not there."""
    steps = sorted(checkpoints.all_steps())
    if not steps:
        raise FileNotFoundError(f"The run in {workdir} has no checkpoint yet.")
    if step not in steps:
        kept = ", ".join(map(str, steps))
        raise FileNotFoundError(
            f"{workdir} has no checkpoint of step {step}; the steps kept are: {kept}."
        )


def save(checkpoints: ocp.CheckpointManager, state, score: float | None = None) -> None:
    """Saves a state under its step; the writing goes on in the background.

    If it cannot be written, a warning says so and nothing of it stays on the disk.

    Args:
      checkpoints: from `manager`.
      state: a `train_step.State`.
      score: of this state, if it was evaluated; the highest is chosen. R@1 of the validation
        classes, or, where there are none, the step, so that the last one is.
    """
    finish(checkpoints)  # one at a time, and room is made for this one
    step = int(state.step)
    if step in checkpoints.all_steps():
        if score is None or checkpoints.metrics(step) is not None:
            return
        checkpoints.delete(step)  # it was saved without metrics when a signal came
    with files.warn_on_write_error(f"The checkpoint of step {step}"):
        needed = sum(array.nbytes for array in jax.tree.leaves(state))
        free = shutil.disk_usage(checkpoints.directory).free
        if free < needed:
            raise OSError(f"it needs {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free")
        # A copy, since the next training step takes over the state's own buffers.
        state = jax.tree.map(jnp.copy, _fields(state))
        metrics = None if score is None else {"score": score}
        checkpoints.save(step, args=ocp.args.StandardSave(state), metrics=metrics)


def finish(checkpoints: ocp.CheckpointManager) -> None:
    """Waits for the last save; if it failed, warns and removes what it left on the disk."""
    finished = False
    with files.warn_on_write_error("A checkpoint"):
        checkpoints.wait_until_finished()
        finished = True
    if not finished:
        if processes.is_first():
            for remains in checkpoints.directory.glob("*" + ocp.utils.TMP_DIR_SUFFIX + "*"):
                shutil.rmtree(remains, ignore_errors=True)
        checkpoints.reload()  # its list of steps no longer matches the disk


def restore_latest(checkpoints: ocp.CheckpointManager, state):
    """Restores the latest readable checkpoint.

    Later ones, which are damaged, are moved to `damaged` beside the checkpoints with a warning.

    Args:
      checkpoints: from `manager`, for writing.
      state: as for `restore`.

    Returns:
      The saved state, or None if there is no checkpoint.

    Raises:
      ConfigError: As `restore`.
      PermissionError: The latest one must not be read by this user, which is no damage.
      OSError: There are checkpoints, and none can be read; all are left as they are.
    """
    errors = {}
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            saved = restore(checkpoints, state, step)
            break
        except ConfigError:
            raise
        except Exception as error:  # orbax, TensorStore and JSON each have their own
            folder = Path(checkpoints.directory, str(step))
            for path in (folder, *sorted(folder.rglob("*"))):
                if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
                    raise PermissionError(
                        f"The latest checkpoint, of step {step}, cannot be read: no permission for "
                        f"{path}. Give it (chmod -R u+rwX {folder}), or choose another --workdir=."
                    ) from error
            errors[step] = " ".join(str(error).split())[:300]
    else:
        if errors:
            listed = "; ".join(f"step {step}: {reason}" for step, reason in errors.items())
            raise OSError(
                f"No checkpoint in {checkpoints.directory} can be read, so the run cannot go on "
                f"from there. Choose another --workdir=, or mend or delete them. {listed}"
            )
        return None
    for step, reason in errors.items():
        damaged = Path(checkpoints.directory).with_name("damaged") / f"{step}-{time.time_ns()}"
        if processes.is_first():
            damaged.parent.mkdir(exist_ok=True)
            Path(checkpoints.directory, str(step)).rename(damaged)
        log.warning("Checkpoint %d is damaged and was moved to %s: %s", step, damaged, reason)
    if errors:
        processes.wait_for_all("damaged checkpoints are moved")
        checkpoints.reload()
    return saved


def restore(checkpoints: ocp.CheckpointManager, state, step: int):
    """Restores the state of a step.

    Args:
      checkpoints: from `manager`.
      state: a state of the same structure, shapes and shardings; only those are
        used.
      step: one of `checkpoints.all_steps()`.

    Returns:
      The saved state, laid over the devices as `state` is.

    Raises:
      ConfigError: It was trained on another number of classes.
    """
    _check_classes(checkpoints, state, step)
    abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, _fields(state))
    saved = checkpoints.restore(step, args=ocp.args.StandardRestore(abstract))
    return dataclasses.replace(state, **saved)


def _fields(state) -> dict[str, Any]:
    """Returns what is saved of a state: no memory where there is none, as before it existed."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    if fields["memory"] is None:
        del fields["memory"]
    return fields


def _check_classes(checkpoints: ocp.CheckpointManager, state, step: int) -> None:
    """Refuses another data set than a checkpoint was trained on, as far as classes tell.

    A run of this version records its data set and is compared with that, see
    `workdir.check_data`; of an older one this is all there is.
    """
    try:
        saved = checkpoints.item_metadata(step).tree["params"]["auxiliary_fc"]["bias"].shape[0]
        wanted = state.params["auxiliary_fc"]["bias"].shape[0]
    except Exception:  # damaged, which is found out when it is read; or no network of ours
        return
    if saved != wanted:
        raise ConfigError(
            f"The checkpoint of step {step} in {checkpoints.directory} was trained on {saved:,} "
            f"classes, and the data set has {wanted:,} to train on now. Restore the data set as it "
            f"was, or train in another folder with --workdir=."
        )


def read_weights(workdir: str | Path, step: int | None = None) -> tuple[dict, Normalization, int]:
    """Reads the weights of a checkpoint, without its network or data set.

    Args:
      workdir: folder of the run.
      step: of the checkpoint; None for the one with the best R@1, or the latest if none
        was evaluated.

    Returns:
      {"params": ..., "batch_stats": ...} of NumPy arrays, the network's parameters, averaged if
      the run averages them; the normalization of the pixels; the step.

    Raises:
      FileNotFoundError: There is no such checkpoint.
    """
    with manager(workdir) as checkpoints:
        if step is None:
            step = checkpoints.best_step()
        if step is None:
            step = checkpoints.latest_step()
        check_step(checkpoints, step, workdir)
    folder = Path(workdir, FOLDER, str(step), "default").resolve()
    log.info("Weights of step %d of %s.", step, workdir)
    with ocp.PyTreeCheckpointer() as reader:
        # As NumPy arrays: the run may have had other devices than there are here.
        metadata = reader.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
        state = reader.restore(folder, restore_args=as_numpy)
    variables = {
        "params": network_params(state.get("average") or state["params"]),
        "batch_stats": state["batch_stats"],
    }
    return variables, Normalization.of(**state["normalization"]), step
