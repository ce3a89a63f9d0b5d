"""Checkpoints of a run: the latest few and the best one, written by orbax.

A save is written under a temporary name and renamed when complete, so that a run
killed in the middle of it finds the checkpoint before.
"""

import dataclasses
import json
import logging
import os
import shutil
import time
from functools import partial
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
    """Opens the checkpoints of a work folder; closing them waits for the last save.

    `keep` of the latest survive, beside the best. None opens them for reading, which is safe
    while a run writes there.
    """
    check_folder(workdir)
    writing, folder = keep is not None, Path(workdir, FOLDER).resolve()
    _check_metrics(folder, writing)
    policies = [
        preservation_policy.LatestN(keep),
        preservation_policy.BestN(
            get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False
        ),
    ]
    options = ocp.CheckpointManagerOptions(
        best_fn=_score,
        preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
        create=writing,
        # A killed run may have left an unfinished save.
        cleanup_tmp_directories=writing,
    )
    return ocp.CheckpointManager(
        folder,
        options=options,
        # Explicit: orbax would infer it from the latest checkpoint, which may be damaged.
        item_handlers=ocp.StandardCheckpointHandler(),
    )


def _score(metrics: dict | None) -> float:
    if metrics is None:
        return -1.0
    return metrics["score" if "score" in metrics else "recall_at_1"]  # its name in 0.1.0


def _metrics(score: float) -> dict[str, Any]:
    return {"score": score, "digest": files.digest({"score": np.array(score)})}


def _check_metrics(folder: Path, writing: bool) -> None:
    """Sets damaged scores aside, or refuses them: they say which checkpoint is the best."""
    for path in sorted(folder.glob("*/metrics/metrics")):
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
            expected = _metrics(float(_score(metrics)))
            if metrics.get("digest", expected["digest"]) == expected["digest"]:
                continue  # without a digest: of an older version
        except FileNotFoundError:  # deleted meanwhile
            continue
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        if not writing:
            raise ConfigError(
                f"The score in {path} is damaged, so it is not known which checkpoint is the best. "
                f"Delete {path.parent}, and that checkpoint counts as one that was not evaluated."
            )
        aside = _set_aside(path.parent, f"{path.parts[-3]}-metrics")
        log.warning(
            "The score of checkpoint %s is damaged; it is now in %s.", path.parts[-3], aside
        )
    if writing:
        processes.wait_for_all("damaged metrics are moved")


def _set_aside(path: Path, name: str) -> Path:
    """Moves something damaged out of the checkpoints, into `damaged` beside them."""
    aside = next(p for p in path.parents if p.name == FOLDER).with_name("damaged")
    aside = aside / f"{name}-{time.time_ns()}"
    if processes.is_first():
        aside.parent.mkdir(exist_ok=True)
        path.rename(aside)
    return aside


def save(checkpoints: ocp.CheckpointManager, state, score: float | None = None) -> None:
    """Saves a state under its step; the writing goes on in the background.

    If it cannot be written, a warning says so and nothing of it stays on the disk. The state
    with the highest `score` is chosen: R@1 of the validation classes, or, where there are none, the
    step, so that the last one is.
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
        fields = jax.tree.map(jnp.copy, _fields(state))
        fields["digest"] = _digest(fields)
        checkpoints.save(
            step,
            args=ocp.args.StandardSave(fields),
            metrics=None if score is None else _metrics(score),
        )


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
    """Restores the latest readable checkpoint; None if there is no checkpoint.

    Later ones, which are damaged, are moved to `damaged` beside the checkpoints with a warning;
    if none can be read, all are left as they are.
    """
    steps = sorted(checkpoints.all_steps(), reverse=True)
    if not steps:
        return None
    _, saved, damaged = _first_readable(checkpoints, steps, state)
    for step, reason in damaged.items():
        aside = _set_aside(Path(checkpoints.directory, str(step)), str(step))
        log.warning("Checkpoint %d is damaged and was moved to %s: %s", step, aside, reason)
    if damaged:
        processes.wait_for_all("damaged checkpoints are moved")
        checkpoints.reload()
    return dataclasses.replace(state, **saved)


def restore(checkpoints: ocp.CheckpointManager, state, step: int | None = None):
    """Restores the state of a step, see `_read_chosen`.

    `state` has the structure, shapes and shardings of what is returned; only those are used.
    """
    return dataclasses.replace(state, **_read_chosen(checkpoints, step, state)[1])


def read_weights(workdir: str | Path, step: int | None = None) -> tuple[dict, Normalization, int]:
    """Reads the weights of a checkpoint, see `_read_chosen`, without its network or data set.

    Returns {"params": ..., "batch_stats": ...} of NumPy arrays, the network's parameters,
    averaged if the run averages them; the normalization of the pixels; the step.
    """
    with manager(workdir) as checkpoints:
        step, state = _read_chosen(checkpoints, step)
    log.info("Weights of step %d of %s.", step, workdir)
    variables = {
        "params": network_params(state.get("average") or state["params"]),
        "batch_stats": state["batch_stats"],
    }
    return variables, Normalization.of(**state["normalization"]), step


def _read_chosen(checkpoints: ocp.CheckpointManager, step: int | None, state=None):
    """Returns a step, and the fields saved of it; FileNotFoundError if it is not there.

    Without a step it is that of the highest score, or the latest if none was evaluated; if that
    is damaged, the next best with a warning.
    """
    steps = sorted(checkpoints.all_steps(), reverse=True)
    run = Path(checkpoints.directory).parent
    if not steps:
        raise FileNotFoundError(f"The run in {run} has no checkpoint yet.")
    if step not in (None, *steps):
        kept = ", ".join(map(str, sorted(steps)))
        raise FileNotFoundError(
            f"{run} has no checkpoint of step {step}; the steps kept are: {kept}."
        )
    steps.sort(key=lambda step: -_score(checkpoints.metrics(step)))
    wanted = steps if step is None else [step]
    found, saved, damaged = _first_readable(checkpoints, wanted, state)
    for step, reason in damaged.items():
        log.warning("Checkpoint %d is damaged; %d takes its place. %s", step, found, reason)
    return found, saved


def _first_readable(checkpoints: ocp.CheckpointManager, steps: list[int], state):
    """Returns the first step that can be read, its fields, and what is wrong with those before."""
    damaged: dict[int, str] = {}
    for step in steps:
        try:
            return step, _read(checkpoints, step, state), damaged
        except ConfigError:
            raise
        except Exception as error:  # orbax, TensorStore and JSON each have their own
            folder = Path(checkpoints.directory, str(step))
            for path in (folder, *sorted(folder.rglob("*"))):
                if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
                    raise PermissionError(
                        f"The checkpoint of step {step} cannot be read: no permission for {path}. "
                        f"Give it (chmod -R u+rwX {folder}), or choose another --workdir=."
                    ) from error
            damaged[step] = " ".join(str(error).split())[:300]
    listed = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
    raise OSError(
        f"No checkpoint that could be taken from {checkpoints.directory} can be read. Choose "
        f"another --workdir= or --step=, or mend or delete them. {listed}"
    )


def _read(checkpoints: ocp.CheckpointManager, step: int, state) -> dict[str, Any]:
    """Returns the fields saved of a step, laid over the devices as those of a state are.

    Without a state they are NumPy arrays: the run may have had other devices than there are here.
    """
    metadata = checkpoints.item_metadata(step)
    if metadata is None:
        raise ValueError("its metadata cannot be read")
    tree = metadata.tree
    fields = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), tree)
    if state is not None:
        _check_classes(checkpoints, state, step)
        digest = {"digest": fields["digest"]} if "digest" in fields else {}
        fields = jax.tree.map(ocp.tree.to_shape_dtype_struct, _fields(state)) | digest
    saved = checkpoints.restore(step, args=ocp.args.StandardRestore(fields))
    digest = saved.pop("digest", None)  # there is none of an older version
    if digest is not None and not np.array_equal(digest, _digest(saved)):
        raise ValueError("its arrays are not those that were saved, by their digest")
    return saved


def _digest(fields: dict[str, Any]) -> np.ndarray:
    """Returns a digest of all arrays, [8] uint8: of a state as of what is read without one."""
    arrays, _ = jax.tree_util.tree_flatten_with_path(fields)
    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    found = files.digest({name(path): processes.to_host(array) for path, array in arrays})
    return np.frombuffer(bytes.fromhex(found), np.uint8)


def _fields(state) -> dict[str, Any]:
    """Returns what is saved of a state: no memory where there is none, as before it existed."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    if fields["memory"] is None:
        del fields["memory"]
    return fields


def _check_classes(checkpoints: ocp.CheckpointManager, state, step: int) -> None:
    """Refuses another data set than a checkpoint was trained on, as far as classes tell.

    Runs record their data set, see `workdir.check_data`; of an older run this is all there is.
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
