"""Images on their way to vectors on a cluster of Ray, https://docs.ray.io: `cgd_jax index --on=`.

Workers read and embed, a piece of the list at a time; this process alone writes, so that the index
is the one that it would make by itself. Of a worker that dies, Ray gives the piece to another one.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cgd_jax.network import BATCHES
from cgd_jax.reports.names import literal
from cgd_jax.runtime import packages
from cgd_jax.runtime.console import progress
from cgd_jax.runtime.errors import InputError, UserError
from cgd_jax.search import embedding, images
from cgd_jax.search.images import Listed

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else it tells its makers of every start
os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # of 35 s, for a cluster that is gone
packages.require("--on", "ray", "ray")
import ray  # noqa: E402

__all__ = ["read_and_embed"]

PIECE = 4 * BATCHES[-1]  # images of a task, at most
AHEAD = 2  # tasks for every place of the cluster
RETRIES = 10  # of a task, each on a new worker

Outcome = tuple[Listed, Any, np.ndarray | None]


def read_and_embed(
    items: Sequence[Listed],
    read: Callable[[Listed], Any],
    index: Any,
    address: str,
) -> Iterator[Outcome]:
    """Does what `embedding.read_and_embed` does, in any order, on a cluster.

    The address is "ray", the cluster that this machine belongs to, or ray://HOST:10001. Raises
    InputError: there is no such cluster, or its workers do not see the images; UserError: they
    cannot do their work.
    """
    try:
        # None would start one, by forking a process in which JAX has threads.
        where = "auto" if address == "ray" else address
        ray.init(where, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())[-300:]
        raise InputError(
            f"--on={address}: no cluster of Ray can be reached there; `ray start --head` makes one "
            f"of this machine. {text}"
        ) from error
    try:
        # The network without what it has compiled.
        kit = ray.put((read, embedding.Embedder(replace(index.network), index.whitening)))
        yield from _by_tasks(items, kit, address)
    except ray.exceptions.RayError as error:
        text = " ".join(str(getattr(error, "cause", None) or error).split())
        raise UserError(
            f"--on={address}: the workers cannot do it: {text[-500:]}. What was written before is "
            f"kept; mend what is named here and repeat the command: it goes on from there."
        ) from error
    finally:
        ray.shutdown()


def _by_tasks(items: Sequence[Listed], kit: Any, address: str) -> Iterator[Outcome]:
    options, places = _places()
    task = ray.remote(**options, max_retries=RETRIES)(_work)
    size = max(1, min(PIECE, len(items) // (AHEAD * places)))
    pieces = [items[at : at + size] for at in range(0, len(items), size)][::-1]
    running: list[Any] = []
    with progress(len(items), "indexing") as bar:
        while pieces or running:
            while pieces and len(running) < AHEAD * places:
                running.append(task.remote([kit], pieces.pop()))
            (done, *_), running = ray.wait(running)
            outcomes = ray.get(done)
            bar.update(len(outcomes))
            for (record, file), found, _ in outcomes:
                if isinstance(found, FileNotFoundError) and os.path.exists(file):
                    raise InputError(
                        f"--on={address}: a worker does not see {literal(record.path)}, which is "
                        f"there. Workers read images under the same paths as this process: give a "
                        f"folder on a disk that all of them share, or in a bucket, and no archive."
                    )
            yield from outcomes


def _places() -> tuple[dict[str, float], int]:
    """Returns what a task takes, a GPU and its share of the cores or all of a node, and how many.

    A node's cores all read and embed for one task, as they do without a cluster.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if gpus:
        share = min(node.get("CPU", 0) // node["GPU"] for node in nodes if node.get("GPU"))
        return {"num_gpus": 1, "num_cpus": share}, gpus
    # A cluster that grows on demand may have no core yet.
    cores = min((node["CPU"] for node in nodes if node.get("CPU")), default=1)
    return {"num_cpus": cores}, int(sum(node.get("CPU", 0) // cores for node in nodes)) or 1


def _work(kit: list[Any], piece: Sequence[Listed]) -> list[Outcome]:
    """Reads and embeds some images, on a worker."""
    outcomes = embedding.read_and_embed(piece, *_received(kit[0]))
    return [(item, _plain(found), vector) for item, found, vector in outcomes]


@functools.lru_cache(1)
def _received(kit: Any) -> tuple:
    """Fetches what tasks have in common; a worker does so once, and compiles once."""
    return ray.get(kit)


def _plain(found: Any) -> Any:
    """Returns an error as one that can be sent anywhere."""
    if not isinstance(found, Exception) or isinstance(found, FileNotFoundError):
        return found
    kind = ValueError if isinstance(found, ValueError) else OSError
    return kind(images.reason_of(found))
