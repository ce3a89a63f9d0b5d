"""How the devices of a mesh hold what a run holds.

Batches are divided. The state is replicated, or, with `train.shard="parameters"`, divided as well:
each device keeps a part of every large array of it (parameters, their average, the optimizer's
state, proxies, memory), and the compiler gathers weights where they are used and scatters their
gradients. This is fully sharded data parallelism, as JAX's documentation does it:
https://docs.jax.dev/en/latest/notebooks/Distributed_arrays_and_automatic_parallelization.html.
"""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

SHARDS = ("none", "parameters")
SMALL = 2**14  # numbers in an array that is not worth dividing


def shardings(mesh: jax.sharding.Mesh) -> tuple[NamedSharding, NamedSharding]:
    """Returns how a mesh holds what is replicated, and what is divided along the first axis."""
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))


def lay_out(shapes: Any, mesh: jax.sharding.Mesh, shard: str) -> Any:
    """Returns the sharding of every array of a tree, of which shapes are enough.

    One is divided along its longest axis that the devices divide evenly; small ones, and those
    that have no such axis, are replicated.
    """
    replicated, _ = shardings(mesh)

    def of_array(array) -> NamedSharding:
        fitting = [axis for axis, length in enumerate(array.shape) if length % mesh.size == 0]
        if shard == "none" or array.size < SMALL or not fitting:
            return replicated
        longest = max(fitting, key=lambda axis: array.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "data"))

    return jax.tree.map(of_array, shapes)
