"""Several processes, on one machine or many, that train one network together.

Every process runs the same program. Each loads its own rows of every batch; the compiler
arranges what is computed over all devices; only the first process writes reports.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from cgd_jax.runtime.errors import UserError


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins this process to the others, before anything else is done with JAX.

    The first one's address:port, the number of processes and which of them this is are None where
    the environment says so itself (SLURM, Open MPI, Cloud TPU).
    """
    # For CPUs; other devices have their own collectives.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"The processes did not find each other: {' '.join(str(error).split())} Where neither "
            f"SLURM nor a TPU pod says who takes part, give every process --coordinator=HOST:PORT "
            f"(of the first one), --num_processes= and its own --process_id=."
        ) from error


def is_first() -> bool:
    """Returns whether this process is the one that writes reports."""
    return jax.process_index() == 0


def report_folder(workdir: str | Path) -> Path:
    """Returns where to write reports: the work folder in the first process, else a scratch one.

    What a run that goes on has in its history, which it decides by, is there too.
    """
    if is_first():
        Path(workdir).mkdir(parents=True, exist_ok=True)
        return Path(workdir)
    scratch = Path(tempfile.mkdtemp(prefix="reports-of-another-process-"))
    with contextlib.suppress(FileNotFoundError):
        shutil.copy(Path(workdir, "history.csv"), scratch)
    return scratch


def wait_for_all(where: str) -> None:
    """Returns once all processes have come to the place that `where` names."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def stop_together(sharding: jax.sharding.NamedSharding) -> Callable[[bool], bool]:
    """Makes a function by which all processes leave a loop in the same round.

    It is called once a round in every process, with whether this one wants to stop, and returns
    whether any wanted to in the round before: that answer was computed along with the round, so no
    device waits for it. With a single process it returns its argument.
    """
    if jax.process_count() == 1:
        return bool
    asked = []

    def stop(wanted: bool) -> bool:
        mine = np.full(len(sharding.mesh.local_devices), wanted)
        asked.append(_any(jax.make_array_from_process_local_data(sharding, mine)))
        return len(asked) > 1 and bool(asked.pop(0))

    return stop


_any = jax.jit(jnp.any)


def local_mesh(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """Returns the devices of a mesh that belong to this process."""
    if len(_processes_of(mesh)) == 1:
        return mesh
    return jax.sharding.Mesh(np.array(mesh.local_devices), mesh.axis_names)


def share_of_rows(mesh: jax.sharding.Mesh, rows: int) -> slice:
    """Returns which of many rows to work on this process has: every n-th of n processes'.

    All of them if there are fewer rows than processes.
    """
    sharing = _processes_of(mesh)
    if rows < len(sharing):
        return slice(None)
    return slice(sharing.index(jax.process_index()), None, len(sharing))


def merge_rows(array: np.ndarray, mesh: jax.sharding.Mesh) -> np.ndarray:
    """Joins [N, ...], of 32 or 64 bits, that the processes of a mesh computed, each its own rows.

    Rows of other processes hold the dtype's least value: it is the maximum.
    """
    if len(_processes_of(mesh)) == 1:
        return array
    # As bits: JAX would make float64 float32.
    bits = np.ascontiguousarray(array).reshape(-1).view(np.uint32)
    everywhere = np.asarray(multihost_utils.process_allgather(bits))
    return everywhere.view(array.dtype).reshape(-1, *array.shape).max(0)


def _processes_of(mesh: jax.sharding.Mesh) -> list[int]:
    return sorted({device.process_index for device in mesh.devices.flat})


def local_rows(sharding: jax.sharding.NamedSharding, batch: int) -> np.ndarray:
    """Returns which rows of a global batch this process provides, in ascending order."""
    indices = sharding.addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[index] for index in indices]))


def to_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """Returns all of an array, whichever processes hold its parts."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
