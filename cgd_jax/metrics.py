"""Exact retrieval metrics in constant memory: at which ranks do the true matches stand?

The rank of a true match is a count: the gallery items of other classes at least as
similar to the query, plus the true matches before it. In a class of few members, counting
needs one matrix product and a comparison per true match, never a sort, a top-k or a queries
× gallery array. In a class of many, it is cheaper to sort the other items once and to look
every true match up among them; then some rows of similarities are held at a time. All metrics
here follow from these ranks. Similarity is cosine.

>>> embeddings = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.9, 0.3]])
>>> labels = ["cat", "cat", "dog", "dog"]
>>> recall_at_k(embeddings, labels, ks=(1, 2, 3))
{1: 0.75, 2: 0.75, 3: 1.0}

Ties: a gallery item of another class within ``TIE`` of a true match's cosine is tied with
it. By default it ranks before it, so that a model that maps everything to one point scores
0; ``ties="optimistic"`` ranks it after, ``ties="mean"`` takes the mean of both ranks.
"""

import csv
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import ArrayLike

from cgd_jax.retrieval import PRECISIONS, check_matrix, check_rows
from cgd_jax.runtime import files, processes, threads

__all__ = [
    "PRECISIONS",
    "RankingOptions",
    "as_labels",
    "cluster_agreement",
    "confidence_intervals",
    "evaluate",
    "first_ranks",
    "normalize",
    "own_index",
    "recall_at_k",
    "recall_of_ranking",
    "write_per_class",
]

# Two float32 cosines closer than this count as equal: the order of summation alone, which
# differs between kernels, between shards and at the edges of tiles, moves them as much.
TIE = 1e-6
TIES = {"pessimistic": (-TIE,), "optimistic": (TIE,), "mean": (-TIE, TIE)}

# One product is at most BLOCK queries × GALLERY_BLOCK items. STEPS blocks of queries meet a
# block of the gallery while it is on the device. The copy to an accelerator takes longer than
# the product with 8,192 queries.
BLOCK, STEPS, GALLERY_BLOCK = 1024, 8, 2**14
STEPS_ON_ACCELERATORS = 64
# Rows and columns of a product that are counted at a time on a CPU, and stay in its cache.
TILE = (256, 4096)
# Side of the small products that only look at true matches.
WINDOW = 256
# Numbers per query and true match that a call may hold.
MATCHES = 2**21

# Members of a class from which sorting a row of similarities is cheaper than comparing it with
# every true match. An accelerator compares much faster, and the rows are sorted on the host.
SORTED_FROM = {"cpu": 64}
SORTED_FROM_ON_ACCELERATORS = 1024
# Similarities that are held for sorting: 256 MB.
HELD = 2**26


class RankingOptions(TypedDict, total=False):
    """How the gallery is ranked, for all metrics of embeddings.

    Attributes:
      query_ids: [Q], integers or strings. A gallery item with the query's id is the query
        itself and is not searched. Without a gallery the position is the id. With a gallery
        and no ids, nothing is left out. Copies under other ids are neighbours like any other.
      gallery_ids: [G], likewise.
      ties: "pessimistic" (default), "optimistic" or "mean", see the module.
      precision: of the matrix product, "highest" (default; full float32 on every device),
        "high" or "default" (the device's fastest: TF32 or bfloat16).
      mesh: whose devices share the queries; None for one device. If it spans several
        processes, each of them must make the same call.
    """

    query_ids: ArrayLike | None
    gallery_ids: ArrayLike | None
    ties: str
    precision: str
    mesh: Mesh | None


def recall_at_k(
    query: ArrayLike,
    query_labels: ArrayLike,
    gallery: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
    ks: Sequence[int] = (1, 2, 4, 8),
    **options: Unpack[RankingOptions],
) -> dict[int, float]:
    """Share of queries with a true match among the k most similar gallery items.

    Faster than `evaluate`, since the first true match's rank is enough.

    Args:
      query: embeddings [Q, D], any real dtype; L2-normalized here, in float32.
      query_labels: [Q], integers or strings.
      gallery: embeddings [G, D]; None searches the queries themselves, where no query
        finds itself.
      gallery_labels: [G]; given if and only if `gallery` is.
      ks: the values of k.
      **options: see `RankingOptions`.

    Returns:
      {k: recall}, floats in [0, 1] over the queries that have a true match.

    Raises:
      ValueError: embeddings that are empty or not finite, shapes that do not fit,
        unknown options, or no query with a true match.

    >>> recall_at_k([[1, 0]], [7], gallery=[[0, 1], [1, 1]], gallery_labels=[8, 7], ks=(1,))
    {1: 1.0}
    """
    ks = _check_ks(ks)
    best = first_ranks(query, query_labels, gallery, gallery_labels, **options)
    best = best[np.isfinite(best)]
    return {k: float(np.mean(best <= k)) for k in ks}


def first_ranks(
    query: ArrayLike,
    query_labels: ArrayLike,
    gallery: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
    **options: Unpack[RankingOptions],
) -> np.ndarray:
    """The rank of every query's first true match; arguments as for `recall_at_k`.

    Returns:
      [Q] float64, 1 for the most similar gallery item; NaN for queries that have no true
      match.

    Raises:
      ValueError: as `recall_at_k`.

    >>> first_ranks([[1, 0], [0, 1], [1, 1], [1, 0]], ["a", "b", "a", "c"])
    array([ 2., nan,  3., nan])
    """
    query_labels = as_labels("query_labels", query_labels)
    best = np.full(len(query_labels), -np.inf)  # what it stays without a true match
    for rows, _, ranks in _true_match_ranks(
        query, query_labels, gallery, gallery_labels, first=True, **options
    ):
        best[rows] = ranks[:, 0]
    best = _merge(best, options)
    return np.where(best > -np.inf, best, np.nan)


def evaluate(
    query: ArrayLike,
    query_labels: ArrayLike,
    gallery: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    bootstrap: int = 0,
    per_class: bool = False,
    clustering: bool = False,
    seed: int = 0,
    **options: Unpack[RankingOptions],
) -> dict:
    """Every metric of a ranking, with its uncertainty.

    Args:
      query: and query_labels, gallery, gallery_labels, ks: as for `recall_at_k`.
      bootstrap: number of resamplings for 95 % confidence intervals, see
        `confidence_intervals`; 0 for none.
      per_class: True adds the mean of every metric over the queries of each class.
      clustering: True adds NMI and AMI of the queries' embeddings, see `cluster_agreement`.
      seed: of the resampling and of k-means.
      **options: see `RankingOptions`.

    Returns:
      dict of plain numbers. With R the number of the query's true matches, means over
      the queries with R > 0 of:
        recall@k: 1 if a true match is among the first k.
        precision@k: share of true matches among the first k.
        r_precision: precision@R. map@r: mean over the first R places of the precision
          there if the place holds a true match, else 0
          (Musgrave et al., https://arxiv.org/abs/2003.08505).
        map: mean over the true matches of the precision at their rank.
        mrr: 1 / rank of the first true match.
      And: queries, the number measured; excluded, the number left out for R = 0;
      with `bootstrap` confidence, {metric: [low, high]}; with `per_class`
      per_class, a list of rows for `write_per_class`; with `clustering` nmi and ami.

    Raises:
      ValueError: as `recall_at_k`.
      ImportError: `clustering` without scikit-learn.

    >>> found = evaluate([[1.0, 0], [1, 0.1], [0, 1], [0.9, 0.3]], [0, 0, 1, 1], ks=(1,))
    >>> {name: round(value, 3) for name, value in found.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'recall@1': 0.75, 'precision@1': 0.75, 'r_precision': 0.75, 'map@r': 0.75, 'map': 0.833,
     'mrr': 0.833, 'queries': 4, 'excluded': 0}
    """
    ks = _check_ks(ks)
    names = [*(f"recall@{k}" for k in ks), *(f"precision@{k}" for k in ks)]
    names += ["r_precision", "map@r", "map", "mrr"]
    query_labels = as_labels("query_labels", query_labels)
    table = np.full((len(query_labels), len(names)), -np.inf)
    for rows, matches, ranks in _true_match_ranks(
        query, query_labels, gallery, gallery_labels, first=False, **options
    ):
        place = np.arange(1, ranks.shape[1] + 1)
        precision = np.where(np.isfinite(ranks), place / ranks, 0.0)
        within = ranks <= matches[:, None]
        values: list[np.ndarray] = [ranks[:, 0] <= k for k in ks]
        values += [np.sum(ranks[:, :k] <= k, 1) / k for k in ks]  # the n-th rank is at least n
        values.append(within.sum(1) / matches)
        values.append(np.sum(precision * within, 1) / matches)
        values.append(np.sum(precision, 1) / matches)
        values.append(1 / ranks[:, 0])
        table[rows] = np.stack(values, 1)
    table = _merge(table, options)
    rows = np.flatnonzero(table[:, 0] > -np.inf)
    table = table[rows]
    classes, code = np.unique(query_labels[rows], return_inverse=True)
    count = np.bincount(code)
    sums = np.stack([np.bincount(code, column) for column in table.T], 1)

    result = dict(zip(names, (sums.sum(0) / count.sum()).tolist(), strict=True))
    result["queries"], result["excluded"] = len(rows), len(query_labels) - len(rows)
    if bootstrap:
        low, high = confidence_intervals(sums, count, bootstrap, seed)
        result["confidence"] = {n: [float(a), float(b)] for n, a, b in zip(names, low, high)}  # noqa: B905
    if per_class:
        means = sums / count[:, None]
        worst_first = np.lexsort((*means.T[::-1],))
        result["per_class"] = [
            {"class": classes[c].item(), "queries": int(count[c])}
            | dict(zip(names, means[c].tolist(), strict=True))
            for c in worst_first
        ]
    if clustering:
        result |= cluster_agreement(query, query_labels, seed)
    return result


def recall_of_ranking(
    index: ArrayLike,
    query_labels: ArrayLike,
    gallery_labels: ArrayLike,
    ks: Sequence[int] = (1, 2, 4, 8),
    itself: ArrayLike = False,
) -> dict[int, float]:
    """Recall of rankings that do not come from embeddings alone, as `rerank.k_reciprocal`'s.

    Args:
      index: [Q, K], gallery items in order, the query itself left out.
      query_labels: [Q].
      gallery_labels: [G].
      ks: values of k, at most K.
      itself: True where the gallery holds the query itself, bool or [Q] bools.

    Returns:
      {k: recall} over the queries that have a true match.

    Raises:
      ValueError: shapes that do not fit, k beyond the ranking, or no query with a match.

    >>> recall_of_ranking([[2, 0], [1, 2]], ["a", "b"], ["b", "c", "a"], ks=(1, 2))
    {1: 0.5, 2: 0.5}
    """
    index, ks = np.asarray(index), _check_ks(ks)
    query_labels = as_labels("query_labels", query_labels)
    if index.ndim != 2 or query_labels.shape != index.shape[:1] or max(ks) > index.shape[1]:
        raise ValueError(
            f"index must be [Q, K] with K at least {max(ks)} and query_labels [Q], got "
            f"{index.shape} and {query_labels.shape}"
        )
    code, gallery_code = _shared_codes("labels", query_labels, gallery_labels)
    matches = np.bincount(gallery_code, minlength=code.max() + 1)[code] - np.asarray(itself)
    if not (matches > 0).any():
        raise ValueError(
            "no query has a true match in the gallery: check that both are labelled alike"
        )
    hit = gallery_code[index[matches > 0]] == code[matches > 0, None]
    return {k: float(np.mean(hit[:, :k].any(1))) for k in ks}


def confidence_intervals(
    sums: np.ndarray,
    count: np.ndarray,
    resamplings: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> np.ndarray:
    """Percentile bootstrap over classes of means over queries.

    Images of one class are alike, so that classes and not queries are drawn anew, each
    with all of its queries (cluster bootstrap, Field and Welsh 2007).

    Args:
      sums: [C, M], sum over the queries of each class of M metrics.
      count: [C], queries of each class.
      resamplings: number of times that C classes are drawn with replacement.
      seed: of the draws.
      level: share of the resampled means inside the interval.

    Returns:
      [2, M], the lower and the upper ends.

    >>> right, queries = np.array([[9.0], [5.0], [7.0]]), np.array([10, 10, 10])
    >>> confidence_intervals(right, queries)[:, 0].round(2)
    array([0.5, 0.9])
    """
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(resamplings):
        times = np.bincount(rng.integers(0, len(count), len(count)), minlength=len(count))
        means.append(times @ sums / (times @ count))
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)


def cluster_agreement(embeddings: ArrayLike, labels: ArrayLike, seed: int = 0) -> dict[str, float]:
    """Agreement of k-means clusters, as many as classes, with the labels.

    Hours rather than minutes for ten thousand classes: k-means computes all distances to
    all centers many times over.

    Args:
      embeddings: [N, D], L2-normalized here.
      labels: [N].
      seed: of k-means.

    Returns:
      {"nmi": …, "ami": …}, normalized (arithmetic mean) and adjusted mutual information;
      both 1 for identical partitions.

    Raises:
      ValueError: as `recall_at_k`.
      ImportError: scikit-learn is missing.

    >>> cluster_agreement([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], ["a", "a", "b", "b"])
    {'nmi': 1.0, 'ami': 1.0}
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
    except ImportError as error:
        raise ImportError("NMI and AMI need scikit-learn: pip install scikit-learn") from error
    embeddings, labels = _check("embeddings", embeddings, labels)
    found = KMeans(len(np.unique(labels)), n_init=1, random_state=seed).fit_predict(
        np.asarray(normalize(embeddings))
    )
    return {
        "nmi": float(normalized_mutual_info_score(labels, found)),
        "ami": float(adjusted_mutual_info_score(labels, found)),
    }


def write_per_class(path: str | Path, rows: list[dict]) -> None:
    """Writes ``evaluate(..., per_class=True)["per_class"]``, worst classes first, as CSV.

    >>> rows = [{"class": 7, "queries": 2, "recall@1": 0.5}]
    >>> write_per_class("classes.csv", rows)
    >>> print(open("classes.csv").read().strip())
    class,queries,recall@1
    7,2,0.5
    """
    with files.replacing(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@jax.jit
def normalize(x: jax.Array) -> jax.Array:
    """Scales vectors [..., D] to unit length, in float32; zero vectors stay zero.

    Unlike `combination.l2_normalize` it has no floor, and neither the largest nor the
    smallest numbers overflow or vanish.

    >>> normalize(np.array([[3e38, 3e38, 3e38, 3e38], [0, 0, 0, 0]])).tolist()
    [[0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]
    """
    x = x.astype(jnp.float32)
    # First to about 1, so that no square overflows or vanishes. Products, because XLA makes
    # x / a / b into x / (a * b), which does overflow.
    x = x * (1 / jnp.clip(jnp.max(jnp.abs(x), -1, keepdims=True), 1e-37, 8e37))
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x * (1 / jnp.where(norm > 0, norm, 1))


def _true_match_ranks(
    query: ArrayLike,
    query_labels: ArrayLike,
    gallery: ArrayLike | None,
    gallery_labels: ArrayLike | None,
    *,
    first: bool,
    query_ids: ArrayLike | None = None,
    gallery_ids: ArrayLike | None = None,
    ties: str = "pessimistic",
    precision: str = "highest",
    mesh: Mesh | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Ranks of the true matches, block by block.

    Yields (rows [B], matches [B], ranks [B, M]): which queries, how many true matches each
    has, and their ranks in ascending order, infinite beyond the last, or with ``first``
    the first one's only. Queries without a true match do not come.
    """
    for name, value, valid in (
        ("ties", ties, tuple(TIES)),
        ("precision", precision, PRECISIONS),
    ):
        if value not in valid:
            raise ValueError(f"{name} is one of {', '.join(valid)}, not {value!r}")
    query, query_labels = _check("query", query, query_labels)
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("give both gallery and gallery_labels, or neither")
    if gallery is None or gallery_labels is None:
        if gallery_ids is not None:
            raise ValueError("gallery_ids without a gallery")
        gallery, gallery_labels = query, query_labels
        query_ids = np.arange(len(query)) if query_ids is None else query_ids
        gallery_ids = query_ids
    else:
        gallery, gallery_labels = _check("gallery", gallery, gallery_labels)
        if query.shape[1] != gallery.shape[1]:
            raise ValueError(
                f"query and gallery must have embeddings of one size, got {query.shape} "
                f"and {gallery.shape}"
            )
        if (query_ids is None) != (gallery_ids is None):
            raise ValueError("give both query_ids and gallery_ids, or neither")

    # The members of a query's class are order[start : end]: true matches are known by index.
    # Large classes come last, so that blocks of queries have about as many matches each.
    code, gallery_code = _shared_codes("labels", query_labels, gallery_labels)
    members = np.bincount(gallery_code, minlength=code.max() + 1)
    order = np.lexsort((gallery_code, members[gallery_code]))
    start = np.zeros(len(members), int)
    start[gallery_code[order[::-1]]] = np.arange(len(order))[::-1]
    start, end = start[code], start[code] + members[code]
    own = np.full(len(query), -1)  # where the query itself stands in the gallery
    matches = members[code]
    if query_ids is not None and gallery_ids is not None:
        own = own_index(query_ids, gallery_ids, len(query), len(gallery))
        matches = matches - ((own >= 0) & (gallery_code[own] == code))
    rows = np.flatnonzero(matches)
    if not len(rows):
        raise ValueError(
            f"none of the {len(query)} queries has a true match among the {len(gallery)} gallery "
            "items: check that both are labelled alike"
        )
    rows = rows[np.argsort(start[rows], kind="stable")]

    if mesh is None:
        mesh = jax.make_mesh((1,), ("all",), devices=jax.local_devices()[:1])
    rows = rows[processes.share_of_rows(mesh, len(rows))]
    mesh = processes.local_mesh(mesh)
    offsets = np.array(TIES[ties], np.float32)
    platform = mesh.devices.flat[0].platform
    least = SORTED_FROM.get(platform, SORTED_FROM_ON_ACCELERATORS)
    large = members[code[rows]] >= least
    if large.any():
        yield from _ranks_in_whole_rows(
            query,
            gallery,
            rows[large],
            matches,
            own,
            members=lambda row: order[start[row] : end[row]],
            offsets=offsets,
            mesh=mesh,
            precision=precision,
            first=first,
        )
    rows = rows[~large]
    if not len(rows):
        return
    ways = mesh.size
    steps = STEPS if platform == "cpu" else STEPS_ON_ACCELERATORS
    at_once = int(np.clip(MATCHES // members[code[rows[-1]]], 1, steps * BLOCK))
    block = ways * _even(min(BLOCK, at_once, -(-len(rows) // ways)), TILE[0])[0]
    steps = min(steps, -(-at_once // BLOCK), -(-len(rows) // block))
    divided = NamedSharding(mesh, P(None, mesh.axis_names))

    for at in range(0, len(rows), steps * block):
        some = rows[at : at + steps * block]
        # Few widths, so that few programs are compiled; the loop inside stops at the last.
        width = 4 ** int(np.ceil(np.log2(end[some[-1]] - start[some[-1]]) / 2))
        place = start[some, None] + np.arange(width)
        true = np.where(place < end[some, None], order[np.minimum(place, len(order) - 1)], -1)
        true = np.where(true == own[some, None], -1, true)
        similarity = _similarity_of_matches(
            query, gallery, order, some, start[some], end[some], width, precision
        )
        similarity[true < 0] = -np.inf
        for _ in range(2):
            descending = -np.sort(-similarity, 1)
            others, seen = _count_others_before(
                *(
                    # The last call repeats some queries.
                    jax.device_put(np.resize(x, (steps, block, *x.shape[1:])), divided)
                    for x in (
                        query[some],
                        descending[:, :1] if first else descending,
                        true,
                        own[some, None],
                    )
                ),
                gallery=gallery,
                offsets=offsets,
                mesh=mesh,
                precision=precision,
            )
            others, seen = (
                np.asarray(x).reshape(steps * block, -1)[: len(some)] for x in (others, seen)
            )
            # Sums of a thousand equal terms, of a collapsed model, differ between products by
            # more than TIE. Then true matches are compared as the counted product has them.
            if np.allclose(seen, similarity, rtol=0, atol=TIE / 2):
                break
            similarity = seen
        ranks = 1 + np.arange(others.shape[1]) + others / len(TIES[ties])
        matched = matches[some]
        within = np.arange(others.shape[1]) < matched[:, None]
        yield some, matched, np.where(within, ranks, np.inf)


def _merge(array, options):
    """The rows of all processes that share the queries."""
    mesh = options.get("mesh")
    return array if mesh is None else processes.merge_rows(array, mesh)


def _ranks_in_whole_rows(
    query, gallery, rows, matches, own, *, members, offsets, mesh, precision, first
):
    """Yields what `_true_match_ranks` does, for `rows` of queries that have many true matches.

    ``members`` maps a query to where in the gallery its class is, itself included; ``matches``
    and ``own`` are of all queries, ``offsets`` as for `_count_others_before`.
    """
    size = _even(len(gallery), GALLERY_BLOCK)[1]
    block = min(BLOCK, max(1, HELD // len(gallery)), len(rows))
    block = -(-block // mesh.size) * mesh.size
    divided, everywhere = (NamedSharding(mesh, p) for p in (P(mesh.axis_names), P()))

    def ranks(row, similarity):
        if own[row] >= 0:
            similarity[own[row]] = -np.inf
        mine = members(row)
        true = similarity[mine]
        if first:
            true = true.max(keepdims=True)
            similarity[mine] = -np.inf
            before = [np.count_nonzero(similarity > true + offset) for offset in offsets]
        else:
            true = -np.sort(-true)[: matches[row]]
            similarity[mine] = np.inf
            similarity.sort()
            others = similarity[: len(similarity) - len(mine)]
            before = [len(others) - np.searchsorted(others, true + o, "right") for o in offsets]
        return np.arange(1, len(true) + 1) + np.mean(before, 0)

    def padded_ranks(some, similarity):
        width = 1 if first else matches[some].max()
        found = np.full((len(some), width), np.inf)
        for row, values, place in zip(some, similarity, found, strict=True):
            true = ranks(row, values)
            place[: len(true)] = true
        return some, matches[some], found

    for at in range(0, len(rows), block):
        some = rows[at : at + block]
        # The last block repeats some queries.
        queries = jax.device_put(query[np.resize(some, block)], divided)
        similarity = np.empty((len(some), len(gallery)), np.float32)
        for begin in range(0, len(gallery), size):
            items = jax.device_put(_padded(gallery[begin : begin + size], size), everywhere)
            product = np.asarray(_product(queries, items, precision))
            similarity[:, begin : begin + size] = product[: len(some), : len(gallery) - begin]
        few = int(np.clip(MATCHES // (16 * matches[some].max()), 1, 64))
        parts = [slice(i, i + few) for i in range(0, len(some), few)]
        yield from threads.parallel(
            lambda part, some=some, held=similarity: padded_ranks(some[part], held[part]), parts
        )


def _similarity_of_matches(query, gallery, order, rows, start, end, width, precision):
    """[S, width], similarity of queries to the members order[start : end] of their class.

    ``rows`` [S] are the queries, in the order of ``start``, so that small products of
    neighbouring queries and items hold what is asked for; the rest is undefined.
    """
    # Only the classes of these queries, one after the other.
    classes, which = np.unique(start, return_inverse=True)
    sizes = np.zeros(len(classes), int)
    sizes[which] = end - start
    stop = np.cumsum(sizes)
    order = order[np.arange(stop[-1]) + np.repeat(classes - stop + sizes, sizes)]
    start, end = (stop - sizes)[which], stop[which]
    similarity = np.zeros((len(rows), width), np.float32)
    slot = np.arange(width)
    for a in range(0, len(order), WINDOW):
        b = min(a + WINDOW, len(order))
        items = _padded(gallery[order[a:b]], WINDOW)
        # Queries with members between a and b.
        lo, hi = np.searchsorted(end, a, "right"), np.searchsorted(start, b)
        for at in range(lo, hi, WINDOW):
            some = slice(at, min(at + WINDOW, hi))
            # Powers of two are few shapes to compile.
            few = _padded(query[rows[some]], 2 ** int(np.ceil(np.log2(some.stop - at))))
            product = np.asarray(_product(few, items, precision))
            column = start[some, None] + slot - a
            i, j = np.nonzero((column >= 0) & (column < b - a))
            similarity[at + i, j] = product[i, column[i, j]]
    return similarity


def _padded(rows, size):
    return np.pad(rows, ((0, size - len(rows)), (0, 0)))


@partial(jax.jit, static_argnames="precision")
def _product(query, items, precision):
    """[B, N], cosines of [B, D] and [N, D]."""
    return jnp.matmul(normalize(query), normalize(items).T, precision=precision)


def _count_others_before(query, similarity, true, own, *, gallery, offsets, mesh, precision):
    """Counts the items of other classes before each true match.

    Args:
      query: [S, B, D]; the blocks of this and of the next three are divided over devices.
      similarity: [S, B, M], of the true matches to count for, the most similar first,
        -inf for none.
      true: [S, B, W], where in the gallery all true matches are, -1 for none.
      own: [S, B, 1], where the query itself is, -1 for nowhere.
      gallery: [G, D], on the host.
      offsets: [T], what is added to a true match's similarity before others are compared.
      mesh: the devices.
      precision: of the product.

    Returns:
      [S, B, M] int32, summed over the offsets, without meaning for no true match; and
      [S, B, W], the similarities of the true matches in the product that was counted.
    """
    size, columns = _even(_even(len(gallery), GALLERY_BLOCK)[1], TILE[1])
    rows = _even(query.shape[1] // mesh.size, TILE[0])[1]
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    counts = jax.device_put(np.zeros(similarity.shape, np.int32), query.sharding)
    seen = jax.device_put(np.full(true.shape, -np.inf, np.float32), query.sharding)
    for begin in range(0, len(gallery), size):
        items = gallery[begin : begin + size]
        padding = size - len(items)
        items = jax.device_put(_padded(items, size), NamedSharding(mesh, P()))
        # While one block of the gallery is counted the next is read, and no third one.
        counts.block_until_ready()
        counts, seen = _add_count(
            *(counts, seen),
            *(query, similarity, true, own, items),
            *(np.int32(begin), np.int32(padding), offsets),
            mesh=mesh,
            precision=precision,
            tile=(rows, columns) if on_cpu else (query.shape[1] // mesh.size, size),
        )
    return counts, seen


@partial(jax.jit, static_argnames=("mesh", "precision", "tile"), donate_argnums=(0, 1))
def _add_count(
    counts,
    seen,
    query,
    similarity,
    true,
    own,
    items,
    begin,
    padding,
    offsets,
    *,
    mesh,
    precision,
    tile,
):
    """Adds the counts of `_count_others_before` in one block of the gallery.

    Its last ``padding`` rows are zero and do not count.
    """
    size = len(items)

    def one_block(items, offsets, counts, seen, query, true_similarity, true, own):
        similarity = jnp.matmul(normalize(query), items.T, precision=precision)

        def similarity_at(index):
            column = jnp.clip(index - begin, 0, size - 1)
            value = jnp.take_along_axis(similarity, column, 1)
            return jnp.where((index >= 0) & (column == index - begin), value, -jnp.inf)

        # Read from the product that is counted, so that true matches, and the query
        # itself, leave the count exactly as they entered it.
        leaving = jnp.concatenate([similarity_at(true), similarity_at(own)], 1)
        for offset in offsets:
            limits = true_similarity + offset
            counts += _count_above(similarity, limits, tile)
            counts -= _count_above(leaving, limits, leaving.shape)
            counts -= padding * (limits < 0)  # zero rows have similarity 0
        return counts, jnp.maximum(seen, leaving[:, :-1])

    def local(items, offsets, *blocks):
        items = normalize(items)
        return lax.map(lambda block: one_block(items, offsets, *block), blocks)

    blocks = P(None, mesh.axis_names)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), P(), *[blocks] * 6),
        out_specs=(blocks, blocks),
        check_vma=False,
    )(items, offsets, counts, seen, query, similarity, true, own)


def _count_above(values, limits, tile):
    """[B, M] int32, how many of values [B, N] exceed each of limits [B, M].

    Limits are in descending order, -inf for none. ``tile`` divides [B, N].
    """
    across = values.shape[1] // tile[1]

    def one_tile(i, counts):
        row = i // across * tile[0]
        some = lax.dynamic_slice(values, (row, i % across * tile[1]), tile)
        these = lax.dynamic_slice(limits, (row, 0), (tile[0], limits.shape[1]))

        def one_limit(j, counts):
            # Sums of ones in float32 are faster on a CPU, and exact up to 2**24.
            above = jnp.sum(some > these[:, j, None], 1, dtype=jnp.float32)
            return counts.at[:, j].add(above.astype(jnp.int32))

        most = jnp.max(jnp.sum(these > -jnp.inf, 1))
        before = lax.dynamic_slice(counts, (row, 0), these.shape)
        after = lax.fori_loop(0, most, one_limit, before)
        return lax.dynamic_update_slice(counts, after, (row, 0))

    tiles = values.shape[0] // tile[0] * across
    return lax.fori_loop(0, tiles, one_tile, jnp.zeros(limits.shape, jnp.int32))


def _even(total, most):
    """(covered, size) of equal parts of at most ``most`` that together cover ``total``."""
    parts = -(-total // most)
    size = -(-total // parts)
    return parts * size, size


def _check(name: str, embeddings: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both as NumPy arrays, embeddings in float32; ValueError for what cannot be ranked."""
    embeddings, labels = np.asarray(check_matrix(name, embeddings)), as_labels("labels", labels)
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"labels must be one per row: {name} {embeddings.shape}, labels {labels.shape}"
        )
    return np.asarray(check_rows(name, embeddings)), labels


def _check_ks(ks):
    ks = tuple(ks)
    if not ks or any(k != int(k) or k < 1 for k in ks):
        raise ValueError(f"ks must be whole numbers from 1, got {ks}")
    return tuple(int(k) for k in ks)


def as_labels(name: str, values: ArrayLike) -> np.ndarray:
    """Returns labels or ids as an array whose values are compared exactly.

    Args:
      name: what they are, for messages.
      values: whole numbers of at most 64 bits, or texts; also as Python's objects, as pandas has
        them.

    Returns:
      An array of int64, of uint64 if there are numbers beyond, or of texts.

    Raises:
      ValueError: floating-point numbers, which may not be exact; a mixture; something else.

    >>> as_labels("labels", np.array(["cat", "dog"], object)).dtype.kind
    'U'
    """
    # Of a list, NumPy itself would make texts of numbers beside texts, and floats of large ones.
    array = values if hasattr(values, "dtype") else np.array(values, object)
    array = np.asarray(array)
    remedy = f"make texts of them, {name}.astype(str), or numbers, numpy.unique with return_inverse"
    if array.dtype.kind in "OT":  # Python's objects, and NumPy's texts of any length
        kinds = {int if isinstance(v, int | np.integer | np.bool_) else type(v) for v in array.flat}
        if not array.size or kinds == {int}:
            numbers = [int(value) for value in array.flat]
            least, most = min(numbers, default=0), max(numbers, default=0)
            if least < -(2**63) or most >= (2**64 if least >= 0 else 2**63):
                raise ValueError(f"{name} from {least} to {most} do not fit into 64 bits; {remedy}")
            kind = np.int64 if most < 2**63 else np.uint64
            return np.array(numbers, kind).reshape(array.shape)
        if all(issubclass(kind, str) for kind in kinds):
            return array.astype(str)
        if kinds == {bytes}:
            return array.astype("S")
        found = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"{name} must be whole numbers or texts, got {found}; {remedy}")
    if array.dtype.kind in "US" or array.dtype == np.uint64:
        return array
    if array.dtype.kind in "iub":
        return array.astype(np.int64)
    raise ValueError(f"{name} must be whole numbers or texts, got {array.dtype}; {remedy}")


def _shared_codes(name, query, gallery):
    """Integers for both that are equal where the values are equal."""
    query, gallery = as_labels(f"query_{name}", query), as_labels(f"gallery_{name}", gallery)
    if query.dtype.kind != gallery.dtype.kind:
        numbers = {"i", "u"}
        if {query.dtype.kind, gallery.dtype.kind} != numbers:
            raise ValueError(
                f"query_{name} and gallery_{name} must both be integers or both be strings, got "
                f"{query.dtype} and {gallery.dtype}"
            )
        # Together they would become float64; as Python's numbers they stay what they are.
        query, gallery = query.astype(object), gallery.astype(object)
    _, code = np.unique(np.concatenate([query, gallery]), return_inverse=True)
    return code[: len(query)], code[len(query) :]


def own_index(query_ids: ArrayLike, gallery_ids: ArrayLike, queries: int, items: int) -> np.ndarray:
    """Where in the gallery each query itself is.

    Args:
      query_ids: [Q], integers or strings.
      gallery_ids: [G], likewise and unique.
      queries: Q, the number of queries.
      items: G, the number of gallery items.

    Returns:
      [Q] integers; -1 for nowhere.

    Raises:
      ValueError: ids that do not fit, or a gallery id that comes twice.

    >>> own_index(["x", "y"], ["z", "x"], 2, 2)
    array([ 1, -1])
    """
    if np.shape(query_ids) != (queries,) or np.shape(gallery_ids) != (items,):
        raise ValueError(
            f"ids must be one per row: query_ids {np.shape(query_ids)} for {queries} queries, "
            f"gallery_ids {np.shape(gallery_ids)} for {items} gallery items"
        )
    query_code, gallery_code = _shared_codes("ids", query_ids, gallery_ids)
    where = np.full(max(query_code.max(), gallery_code.max()) + 1, -1)
    where[gallery_code] = np.arange(items)
    twice = np.flatnonzero(where[gallery_code] != np.arange(items))
    if len(twice):
        raise ValueError(
            f"gallery ids must be unique, {np.asarray(gallery_ids)[twice[0]]!r} comes twice"
        )
    return where[query_code]
