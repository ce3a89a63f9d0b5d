"""Several processes, on one machine or many, that train one network together.

Every process runs the same program. Each loads its own rows of every batch; computations
over all devices are the compiler's; the first process alone writes reports.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

__all__ = [
    "is_first",
    "local_mesh",
    "local_rows",
    "merge_rows",
    "report_folder",
    "share_of_rows",
    "start",
    "to_host",
    "stop_together",
    "wait_for_all",
]


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins this process to the others, before anything else is done with JAX.

    Args:
      coordinator: address:port of the first process; None where the environment says so
        itself (SLURM, Open MPI, Cloud TPU).
      processes: how many there are; None likewise.
      process: which of them this is, from 0; None likewise.

    Raises:
      RuntimeError: they do not find each other.
    """
    # What CPUs talk to each other with; other devices have their own ways.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"The processes did not find each other: {' '.join(str(error).split())} Where neither "
            f"SLURM nor a TPU pod says who takes part, give every process --coordinator=HOST:PORT "
            f"(of the first one), --num_processes= and its own --process_id=."
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes reports."""
    return jax.process_index() == 0


def report_folder(workdir: str) -> Path:
    """Where this process writes reports: the work folder, or for all but the first nowhere."""
    folder = workdir if is_first() else tempfile.mkdtemp(prefix="reports-of-another-process-")
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def wait_for_all(where: str) -> None:
    """Returns when all processes have come to the place that `where` names."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def stop_together(sharding: jax.sharding.NamedSharding) -> Callable[[bool], bool]:
    """How the processes agree, in a loop, to leave it after the same round.

    Args:
      sharding: that divides the first axis over all devices.

    Returns:
      A function that all processes call once a round: whether any of them said True by the
      round before. The answer comes with the work of that round, so that no device waits for
      it. A process that is alone gets back what it says.
    """
    if jax.process_count() == 1:
        return bool
    asked = []

    def vote(flag: bool) -> bool:
        mine = np.full(len(sharding.mesh.local_devices), flag)
        asked.append(_any(jax.make_array_from_process_local_data(sharding, mine)))
        return len(asked) > 1 and bool(asked.pop(0))

    return vote


_any = jax.jit(jnp.any)


def local_mesh(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The devices of a mesh that belong to this process."""
    if len(_members(mesh)) == 1:
        return mesh
    return jax.sharding.Mesh(np.array(mesh.local_devices), mesh.axis_names)


def share_of_rows(mesh: jax.sharding.Mesh, rows: int) -> slice:
    """Which rows of something that needs no communication this process works on.

    Args:
      mesh: whose processes share the work.
      rows: how many there are.

    Returns:
      Every n-th row, at least one. Where there are fewer than processes, everybody has all.
    """
    sharing = _members(mesh)
    if rows < len(sharing):
        return slice(None)
    return slice(sharing.index(jax.process_index()), None, len(sharing))


def merge_rows(array: np.ndarray, mesh: jax.sharding.Mesh) -> np.ndarray:
    """What the processes of a mesh have worked out, each for its own rows.

    Args:
      array: [N, ...], of 32 or 64 bits; what others work out is the least value there is.
      mesh: whose processes share the work.

    Returns:
      The whole, on the host of every process.
    """
    if len(_members(mesh)) == 1:
        return array
    # As bits: JAX would make float64 float32.
    bits = np.ascontiguousarray(array).reshape(-1).view(np.uint32)
    everywhere = np.asarray(multihost_utils.process_allgather(bits))
    return everywhere.view(array.dtype).reshape(-1, *array.shape).max(0)


def _members(mesh: jax.sharding.Mesh) -> list[int]:
    return sorted({device.process_index for device in mesh.devices.flat})


def local_rows(sharding: jax.sharding.NamedSharding, batch: int) -> np.ndarray:
    """Which rows of a global batch this process provides.

    Args:
      sharding: that divides the first axis.
      batch: rows in all.

    Returns:
      Positions in ascending order, as `jax.make_array_from_process_local_data` takes them.
    """
    slices = sharding.addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[index] for (index,) in slices]))


def to_host(array: jax.Array) -> np.ndarray:
    """All of an array, whichever processes hold its parts."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
