"""At which ranks do a query's true matches stand? Exact, whatever the size of the gallery.

A block of queries is multiplied with the whole gallery. In each row of that product the
query's positives are read and taken out, as is what it ignores (first of all itself); the
rank of a positive is then the number of remaining items at least as similar, plus the
positives before it. Since positives and the others are compared within one product, they
are rounded alike. Similarity is cosine.

On a CPU, NumPy counts in threads; on other devices the program that made the product does, so
that no row leaves the device, whose memory must hold the gallery.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import ArrayLike

from cgd_jax.retrieval import check_pair, check_rows, is_cpu, normalize
from cgd_jax.runtime import processes, threads

__all__ = ["TIE", "Relevance", "measure_ranks"]

# Two float32 cosines closer than this count as equal: the order of summation alone, which
# differs between kernels, moves them as much.
TIE = 1e-6
# Similarities that are held at a time, on each device: 256 MB.
HELD = 2**26
# Gallery items in one product on a CPU: memory for more is asked anew of the system each time.
PART = 2**12
# Up to so many positives, comparing a row with each of them is cheaper than sorting it.
FEW = 64


class Relevance(NamedTuple):
    """What the gallery holds for every query: places in it, each once in a list."""

    positives: Sequence[np.ndarray]  # Q arrays: its true matches
    # Q arrays of what is not searched, such as the query itself; also if it is a positive.
    ignored: Sequence[np.ndarray]
    matches: np.ndarray  # [Q], the number of its positives that are not ignored


def measure_ranks(
    measure: Callable[[np.ndarray], dict[str, np.ndarray]],
    query: ArrayLike,
    gallery: ArrayLike,
    relevance: Relevance,
    *,
    first: bool = False,
    precision: str = "highest",
    mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
    """Measures the ranks at which the positives of every query stand: {name: [Q] float64}.

    `measure` makes {name: [B]} of ranks [B, M] float64, in ascending order from 1, and infinite
    beyond a query's last positive; a query without any has NaN. `query` [Q, D] and `gallery`
    [G, D] are of any real dtype and length. With `first` only the most similar positive is ranked.
    `precision` is that of `retrieval.top_k`, of which a CPU knows only "highest"; the devices of
    `mesh` share the queries, as do several processes, all of which must call. Raises ValueError:
    no query has a positive, or vectors do not fit or are not finite.

    >>> relevance = Relevance([np.array([2])], ignored=[np.array([0])], matches=np.array([1]))
    >>> query, gallery = [[1, 0]], [[1, 0], [1, 1], [0, 1]]
    >>> measure_ranks(lambda ranks: {"first": ranks[:, 0]}, query, gallery, relevance)
    {'first': array([2.])}
    """
    query, gallery = check_pair(query, gallery, precision)
    check_matches(relevance.matches, len(gallery))
    asked = np.asarray(check_rows("query", query))
    items = asked if gallery is query else np.asarray(check_rows("gallery", gallery))
    if mesh is None:
        mesh = jax.make_mesh((1,), ("all",), devices=jax.local_devices()[:1])
    # Alike numbers of positives beside each other, as a block is as wide as its widest row.
    rows = np.argsort(relevance.matches, kind="stable")
    rows = rows[relevance.matches[rows] > 0]
    rows = rows[processes.share_of_rows(mesh, len(rows))]
    work, mine = (asked, items, relevance, rows, first), processes.local_mesh(mesh)
    blocks = _ranks_on_cpu(*work) if is_cpu(mine) else _ranks_on_devices(*work, precision, mine)
    found: dict[str, np.ndarray] = {}
    for some, ranks in blocks:
        for name, values in measure(ranks).items():
            found.setdefault(name, np.full(len(asked), -np.inf))[some] = values
    columns = {name: processes.merge_rows(column, mesh) for name, column in found.items()}
    return {name: np.where(x > -np.inf, x, np.nan) for name, x in columns.items()}


def check_matches(matches: np.ndarray, items: int) -> None:
    """Raises ValueError if none of the queries, which have so many matches, has any."""
    if not (matches > 0).any():
        raise ValueError(
            f"none of the {len(matches)} queries has a true match among the {items} gallery items: "
            "check that both are labelled alike"
        )


def _ranks_on_cpu(query, gallery, relevance, rows, first):
    gallery = _of_unit_length(gallery)
    block = _even(len(rows), max(1, min(2**11, HELD // len(gallery))))
    similarity = np.empty((block, len(gallery)), np.float32)
    # Products of one shape add in one order: the last part overlaps, the last block repeats.
    size = _even(len(gallery), PART)
    starts = [min(at, len(gallery) - size) for at in range(0, len(gallery), size)]

    def rank(part):
        some, product = part
        ranks = np.full((len(some), 1 if first else relevance.matches[some].max()), np.inf)
        for q, row, place in zip(some, product, ranks, strict=True):
            found = _ranks_in_row(row, relevance.positives[q], relevance.ignored[q], first)
            place[: len(found)] = found
        return some, ranks

    for at in range(0, len(rows), block):
        some = rows[at : at + block]
        queries = normalize(query[np.resize(some, block)])
        for start in starts:
            end = start + size
            similarity[:, start:end] = _product(queries, gallery[start:end])
        few = int(np.clip(2**18 // relevance.matches[some].max(), 1, 64))
        cuts = range(few, len(some), few)
        parts = zip(np.split(some, cuts), np.split(similarity[: len(some)], cuts), strict=True)
        yield from threads.parallel(rank, parts)


@jax.jit
def _product(query, items):
    return jnp.matmul(query, items.T, precision="highest")


def _ranks_in_row(row, positives, ignored, first):
    """Ranks in similarities [G], which are overwritten."""
    row[ignored] = -np.inf
    true = row[positives]
    row[positives] = -np.inf
    true = true.max(keepdims=True) if first else np.sort(true[true > -np.inf])[::-1]
    limits = true - np.float32(TIE)
    if len(limits) <= FEW:
        others = [np.count_nonzero(row > limit) for limit in limits]
    else:
        near = np.sort(row[row > limits[-1]])
        others = len(near) - np.searchsorted(near, limits, "right")
    return np.arange(1, len(true) + 1) + others


def _ranks_on_devices(query, gallery, relevance, rows, first, precision, mesh):
    divided, everywhere = (NamedSharding(mesh, p) for p in (P(mesh.axis_names), P()))
    items = normalize(jax.device_put(gallery, everywhere))
    # A query holds a row of similarities, and some numbers for each of its positives.
    most = max(1, HELD // (len(gallery) + 16 * relevance.matches.max()))
    block = mesh.size * _even(-(-len(rows) // mesh.size), most)
    for at in range(0, len(rows), block):
        some = rows[at : at + block]
        repeated = np.resize(some, block)
        places = (_side_by_side(lists, repeated, len(gallery)) for lists in relevance[:2])
        arrays = jax.device_put((query[repeated], *places), divided)
        found = _ranks_in_block(items, *arrays, first=first, precision=precision, mesh=mesh)
        ranks = np.asarray(found)[: len(some)]
        yield some, np.where(ranks > 0, ranks, np.inf)


def _side_by_side(lists, queries, fill):
    """The lists of some queries as [B, W] int32, filled up; W is a power of two."""
    some = [lists[q] for q in queries]
    count = np.array([len(items) for items in some])
    width = 2 ** int(np.ceil(np.log2(max(1, count.max()))))
    places = np.full((len(some), width), fill, np.int32)
    places[np.arange(width) < count[:, None]] = np.concatenate(some)
    return places


@partial(jax.jit, static_argnames=("first", "precision", "mesh"))
def _ranks_in_block(gallery, query, positives, ignored, *, first, precision, mesh):
    """Ranks [B, W] int32 of positives [B, W] in ascending order, then 0; [B, 1] with `first`."""

    def local(gallery, query, positives, ignored):
        row = jnp.arange(len(query))[:, None]
        similarity = jnp.matmul(normalize(query), gallery.T, precision=precision)
        similarity = similarity.at[row, ignored].set(-jnp.inf, mode="drop")
        true = similarity.at[row, positives].get(mode="fill", fill_value=-jnp.inf)
        similarity = similarity.at[row, positives].set(-jnp.inf, mode="drop")
        true = true.max(1, keepdims=True) if first else jnp.sort(true, 1, descending=True)
        limits = true - TIE
        if limits.shape[1] <= FEW:
            others = lax.map(lambda limit: jnp.sum(similarity > limit[:, None], 1), limits.T).T
        else:
            search = jax.vmap(partial(jnp.searchsorted, side="right"))
            others = len(gallery) - search(jnp.sort(similarity, 1), limits)
        return jnp.where(true > -jnp.inf, jnp.arange(1, limits.shape[1] + 1) + others, 0)

    of_query = P(mesh.axis_names)
    specs = {"in_specs": (P(), of_query, of_query, of_query), "out_specs": of_query}
    local = jax.shard_map(local, mesh=mesh, check_vma=False, **specs)
    return local(gallery, query, positives, ignored)


def _of_unit_length(x, rows=2**12):
    """Rows of unit length: x itself and not a copy where they have it, as embeddings do."""
    with np.errstate(over="ignore"):
        if np.abs(np.vecdot(x, x) - 1).max() < TIE / 2:
            return x
    scaled = np.empty(x.shape, np.float32)
    for at in range(0, len(x), rows):
        scaled[at : at + rows] = normalize(x[at : at + rows])
    return scaled


def _even(total, most):
    """The size of equal parts, of at most ``most`` each, that together cover ``total``."""
    return -(-total // -(-total // most))
