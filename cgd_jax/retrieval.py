"""Exact nearest neighbours for galleries of any size.

The gallery comes in blocks, from host memory if it is there (a NumPy array or a memory
map), so that only one block and one block of similarities are on a device. Over a mesh
every device searches its share of each block and the shares' best are merged. On one CPU
NumPy multiplies, with its BLAS, in blocks that stay in the cache until they are searched.

Similarity is the dot product: cosine for normalized embeddings.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import ArrayLike

from cgd_jax.runtime import processes, threads

__all__ = ["PRECISIONS", "normalize", "top_k"]

PRECISIONS = ("highest", "high", "default")
# Rows of queries and, at most, of the gallery in one product. Memory is ITEMS × D +
# QUERIES × ITEMS floats, over the devices of the mesh, and less on a CPU.
QUERIES, ITEMS = 2048, 2**16
ALIGNED = 128
# Similarities in one product on a CPU: 16 MB.
TILE = 2**22
LAST = np.uint64(2**32 - 1)

Matrix = np.ndarray | jax.Array


def top_k(
    query: ArrayLike,
    gallery: ArrayLike,
    k: int,
    *,
    exclude: ArrayLike | None = None,
    precision: str = "highest",
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k gallery items most similar to each query.

    Args:
      query: [Q, D], any real dtype, used in float32.
      gallery: [G, D], likewise; NumPy arrays are streamed.
      k: neighbours per query, at most G (G - 1 with `exclude`).
      exclude: [Q] integers, the gallery row that is the query itself and is not found; -1 for none.
      precision: of the product, "highest" (full float32 on every device), "high" or "default" (the
        device's fastest: TF32 or bfloat16).
      mesh: whose devices divide the gallery; None for one device. Of several processes each
        searches for some of the queries, and all must call.

    Returns:
      (similarity [Q, k] float32, index [Q, k] int32), NumPy arrays, most similar first; among
      equals the lower index.

    Raises:
      ValueError: shapes that do not fit, NaN or infinite values, or too large a k.

    >>> similarity, index = top_k([[1, 0]], [[0, 1], [3, 4], [1, 0]], k=2)
    >>> similarity.tolist(), index.tolist()
    ([[3.0, 1.0]], [[1, 2]])
    """
    query, gallery = check_pair(query, gallery, precision)
    most = len(gallery) - (exclude is not None)
    if k != int(k) or not 1 <= k <= most:
        raise ValueError(f"k must be a whole number from 1 to {most} for this gallery, got {k}")
    exclude = np.full(len(query), -1) if exclude is None else np.asarray(exclude)
    if exclude.shape != (len(query),) or exclude.dtype.kind not in "iu":
        raise ValueError(
            f"exclude must be {len(query)} integers, one per query; got {exclude.dtype} "
            f"{exclude.shape}"
        )
    exclude = exclude.astype(np.int64)  # the rows of a block may be beyond smaller numbers
    if mesh is None:
        mesh = jax.make_mesh((1,), ("all",), devices=jax.local_devices()[:1])
    total, everyones = len(query), mesh
    share = processes.share_of_rows(mesh, total)
    query, exclude, mesh = query[share], exclude[share], processes.local_mesh(mesh)
    if mesh.size == 1 and is_cpu(mesh):
        found = _search_in_cache(query, gallery, k, exclude)
    else:
        found = _search_on_devices(query, gallery, k, exclude, precision, mesh)
    merged = []
    for local, least in zip(found, (-np.inf, -1), strict=True):
        everything = np.full((total, k), least, local.dtype)
        everything[share] = local
        merged.append(processes.merge_rows(everything, everyones))
    return merged[0], merged[1]


@jax.jit
def normalize(x: jax.Array) -> jax.Array:
    """Scales vectors [..., D] to unit length, in float32; zero vectors, and they alone, stay zero.

    >>> normalize(np.array([[3e38, 3e38, 3e38, 3e38], [0, 0, 0, 0]])).tolist()
    [[0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]
    """
    x = x.astype(jnp.float32)
    # First to about 1, so that no square overflows or vanishes. XLA makes x / a / b into
    # x / (a * b), which would overflow.
    x = x * (1 / jnp.clip(jnp.max(jnp.abs(x), -1, keepdims=True), 1e-37, 8e37))
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x * (1 / jnp.where(norm > 0, norm, 1))


def is_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def _search_on_devices(query, gallery, k, exclude, precision, mesh):
    divided, everywhere = (NamedSharding(mesh, p) for p in (P(mesh.axis_names), P()))
    block = min(QUERIES, len(query))
    queries = -(-len(query) // block)
    fill = -len(query) % block  # rows of zeros, so that all blocks have one shape
    exclude = np.pad(exclude, (0, fill))
    best = [(np.full((block, k), -np.inf, np.float32), np.full((block, k), -1, np.int32))] * queries

    # The few items behind the last multiple of ALIGNED are a block of their own, because
    # `_largest` copies similarities whose columns are not.
    whole = len(gallery) // (ALIGNED * mesh.size) * ALIGNED * mesh.size
    edges = sorted({*range(0, len(gallery), ITEMS), whole, len(gallery)})
    for start, end in itertools.pairwise(edges):
        items = check_rows("gallery", gallery[start:end], start)
        padding = -len(items) % mesh.size
        items = jax.device_put(np.pad(items, ((0, padding), (0, 0))) if padding else items, divided)
        # While one block of the gallery is searched the next is read, and no third one:
        # device memory holds two.
        jax.block_until_ready(best)
        for i in range(queries):
            rows = slice(i * block, (i + 1) * block)
            some = check_rows("query", query[rows], rows.start)
            some = np.pad(some, ((0, block - len(some)), (0, 0)))
            best[i] = _search(
                *jax.device_put((some, exclude[rows] - start, *best[i]), everywhere),
                items,
                np.int32(start),
                precision=precision,
                mesh=mesh,
                padding=padding,
            )
    return (np.concatenate(found)[: len(query)] for found in zip(*best, strict=True))


@partial(jax.jit, static_argnames=("precision", "mesh", "padding"))
def _search(query, exclude, similarity, index, items, start, *, precision, mesh, padding):
    """Merges the best of one block of the gallery into the best so far, [B, k] each."""
    k = similarity.shape[1]
    axes = mesh.axis_names

    def local(query, exclude, similarity, index, items, start):
        size = len(items)
        begin = lax.axis_index(axes) * size
        product = jnp.matmul(query, items.T, precision=precision)
        if padding:
            real = mesh.size * size - padding
            product = jnp.where(begin + jnp.arange(size) < real, product, -jnp.inf)
        column = exclude - begin
        column = jnp.where(column < 0, size, column)  # a negative index would wrap around
        product = product.at[jnp.arange(len(query)), column].set(-jnp.inf, mode="drop")
        value, at = _largest(product, min(k, size))
        # Lower indices stand to the left, and lax.top_k keeps the leftmost among equals.
        value, at = lax.all_gather((value, start + begin + at), axes, axis=1, tiled=True)
        similarity, chosen = lax.top_k(jnp.concatenate([similarity, value], 1), k)
        return similarity, jnp.take_along_axis(jnp.concatenate([index, at], 1), chosen, 1)

    specs = {"in_specs": (P(), P(), P(), P(), P(axes), P()), "out_specs": P()}
    local = jax.shard_map(local, mesh=mesh, check_vma=False, **specs)
    return local(query, exclude, similarity, index, items, start)


def _largest(x, k):
    """lax.top_k of the rows of [B, N], reading most of x only once.

    The k largest entries lie in the k groups of columns with the largest maxima: any other
    group has k maxima at least as large before it. Of equals the leftmost is kept.
    """
    rows, size = x.shape
    group = 2 ** int(np.log2(size / k) / 2)  # about as many groups as candidates
    if group < 4:
        return lax.top_k(x, k)
    grouped = jnp.pad(x, ((0, 0), (0, -size % group)), constant_values=-jnp.inf)
    grouped = grouped.reshape(rows, -1, group)
    chosen = jnp.sort(lax.top_k(grouped.max(-1), k)[1], 1)
    candidates = jnp.take_along_axis(grouped, chosen[:, :, None], 1).reshape(rows, -1)
    value, at = lax.top_k(candidates, k)
    return value, jnp.take_along_axis(chosen, at // group, 1) * group + at % group


def _search_in_cache(query, gallery, k, exclude):
    """`top_k` by products of NumPy.

    While one product is made, a thread looks at what exceeds the k-th best so far in the last one.
    The best are held as keys that order by similarity, and among equals by index, the lower first.
    """
    query, gallery = (np.asarray(x) if isinstance(x, jax.Array) else x for x in (query, gallery))
    query = check_rows("query", query)
    best = np.zeros((len(query), k), np.uint64)
    most = min(QUERIES, len(query))
    size = min(ITEMS, len(gallery), max(TILE // most, 4 * k))
    most = min(most, max(TILE // size, 1))
    # New memory for every product would cost page faults.
    memory = itertools.cycle([np.empty(most * size, np.float32) for _ in range(2)])
    with ThreadPoolExecutor(threads.CORES) as pool:
        last = pool.submit(lambda: None)
        for block in range(0, len(gallery), ITEMS):
            loaded = _as_float32("gallery", gallery[block : block + ITEMS])
            starts = range(0, len(loaded), size)
            for at, begin in itertools.product(range(0, len(query), most), starts):
                rows, start = slice(at, at + most), block + begin
                items, some = loaded[begin : begin + size], query[rows]
                product = next(memory)[: len(items) * len(some)].reshape(len(items), len(some))
                _multiply(items, some, product, pool)
                # A row that is not finite makes all products with it so, which costs no pass
                # over the gallery.
                if not np.isfinite(product[:, 0]).all():
                    check_rows("gallery", items, start)
                own = exclude[rows] - start
                inside = np.flatnonzero((own >= 0) & (own < len(items)))
                product[own[inside], inside] = -np.inf
                last.result()
                last = pool.submit(_keep_best, best[rows], product, start)
        last.result()
    best = np.sort(best, 1)[:, ::-1]
    return _similarity(best), (LAST - (best & LAST)).astype(np.uint32).view(np.int32)


def _multiply(items, query, product, pool):
    """Writes items @ query.T; for few queries by dot products, which read the items faster."""
    if len(query) >= 8:
        with np.errstate(over="ignore", invalid="ignore"):
            np.matmul(items, query.T, out=product)
        return

    def dot(part):
        with np.errstate(over="ignore", invalid="ignore"):
            np.vecdot(items[part, None], query, out=product[part])

    size = -(-len(items) // threads.CORES)
    list(pool.map(dot, [slice(at, at + size) for at in range(0, len(items), size)]))


def _keep_best(best, product, start):
    """Merges products [N, B] with the items from ``start`` on into keys [B, k], in place.

    Keys are kept in no order but for the least, which comes first.
    """
    queries, k = best.shape
    limit = _similarity(best[:, 0])
    if start == 0 and len(product) > k:
        # Of so many that to order them takes as long as to look at what exceeds their k-th best.
        head = product[: int((8 * k * len(product)) ** 0.5)].T
        limit = np.partition(head, head.shape[1] - k, 1)[:, -k]
        limit = np.nextafter(limit, np.float32(-np.inf))
    # Not "greater", because NaN, of sums that overflow, counts as the largest.
    above = np.less_equal(product, limit)
    above = np.flatnonzero(np.logical_not(above, out=above))
    row = (above % queries).astype(np.min_scalar_type(queries))  # which sorts in linear time
    above = above[np.argsort(row, kind="stable")]
    count = np.bincount(row, minlength=queries)
    some = np.flatnonzero(count)
    if not len(some):
        return
    keys = np.zeros((len(some), k + count.max()), np.uint64)
    keys[:, :k] = best[some]
    within = np.arange(count.max()) < count[some, None]
    keys[:, k:][within] = _keys(product.ravel()[above], start + above // queries)
    best[some] = np.partition(keys, keys.shape[1] - k, 1)[:, -k:]


def _keys(similarity, index):
    """uint64 that order as the similarities do, and among equals the lower index above."""
    # Adding 0 makes 0 of -0. The bits of negative numbers order the wrong way round.
    bits = (np.where(np.isnan(similarity), np.float32(np.nan), similarity) + 0).view(np.int32)
    bits = np.where(bits < 0, ~bits, bits ^ -(2**31)).view(np.uint32)
    return bits.astype(np.uint64) << 32 | (LAST - index.astype(np.uint64))


def _similarity(keys):
    """The float32 similarities in keys, -inf for those that are 0."""
    bits = (keys >> 32).astype(np.uint32).view(np.int32)
    found = np.where(bits < 0, bits ^ -(2**31), ~bits).view(np.float32)
    return np.where(keys == 0, np.float32(-np.inf), found)


def check_pair(query: ArrayLike, gallery: ArrayLike, precision: str) -> tuple[Matrix, Matrix]:
    """Returns both by `check_matrix`; ValueError for two sizes or an unknown precision."""
    query, gallery = check_matrix("query", query), check_matrix("gallery", gallery)
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"query and gallery must have vectors of one size, got {query.shape} and "
            f"{gallery.shape}"
        )
    if precision not in PRECISIONS:
        raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, not {precision!r}")
    return query, gallery


def check_matrix(name: str, x: ArrayLike) -> Matrix:
    """Returns x as an array where it is, on disk or a device; ValueError if not [N, D]."""
    matrix: Any = x if hasattr(x, "shape") else np.asarray(x)
    if len(matrix.shape) != 2 or 0 in matrix.shape:
        raise ValueError(f"{name} must be [N, D] with N and D at least 1, got {matrix.shape}")
    return matrix


def check_rows(name: str, rows: Matrix, start: int = 0) -> Matrix:
    """Returns rows of a matrix, from `start` on, in float32 and where they are.

    ValueError, with the matrix's name, if they are no real numbers, or one is NaN or infinite.
    """
    rows = _as_float32(name, rows)
    if isinstance(rows, jax.Array):
        finite = np.asarray(_finite(rows))
    else:
        # One pass of the processor's fastest kind. A sum that is not finite may still be of
        # numbers that are, only large.
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(rows @ np.ones(rows.shape[1], np.float32)).all():
                return rows
        # A mask of everything is a quarter of the size.
        parts = (rows[at : at + 4096] for at in range(0, len(rows), 4096))
        finite = np.concatenate([np.isfinite(part).all(1) for part in parts])
    if not finite.all():
        row = start + int(finite.argmin())
        raise ValueError(f"row {row} of {name} is NaN or infinite in float32")
    return rows


def _as_float32(name, rows):
    rows = rows if isinstance(rows, jax.Array) else np.asarray(rows)
    if not np.can_cast(rows.dtype, np.float32, "same_kind"):
        raise ValueError(f"{name} must be real numbers, not {rows.dtype}")
    with np.errstate(over="ignore"):
        return rows.astype(np.float32, copy=False)


@jax.jit
def _finite(rows):
    return jnp.isfinite(rows).all(1)
