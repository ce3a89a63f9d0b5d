"""Retrieval metrics, exact and in bounded memory, with their uncertainty.

All follow from the ranks at which a query's true matches stand, see `ranking`. Here a true
match is a gallery item with the query's label. Similarity is cosine.

>>> embeddings = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.9, 0.3]])
>>> labels = ["cat", "cat", "dog", "dog"]
>>> recall_at_k(embeddings, labels, ks=(1, 2, 3))
{1: 0.75, 2: 0.75, 3: 1.0}

Ties: a gallery item of another class within ``TIE`` of a true match's cosine ranks before
it, so that a model that maps everything to one point scores 0.
"""

from collections.abc import Iterator, Sequence
from typing import TypedDict, Unpack

import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from cgd_jax.labels import as_labels, own_index, shared_codes
from cgd_jax.ranking import TIE, Places, Relevance, normalize, ranks_of_positives
from cgd_jax.retrieval import PRECISIONS, check_matrix, check_rows
from cgd_jax.runtime import processes

__all__ = [
    "PRECISIONS",
    "TIE",
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
    "summarize",
]


class RankingOptions(TypedDict, total=False):
    """How the gallery is ranked, for all metrics of embeddings.

    Attributes:
      query_ids: [Q], integers or strings. A gallery item with the query's id is the query
        itself and is not searched. Without a gallery the position is the id. With a gallery
        and no ids, nothing is left out. Copies under other ids are neighbours like any other.
      gallery_ids: [G], likewise.
      precision: of the matrix product, "highest" (default; full float32 on every device),
        "high" or "default" (the device's fastest: TF32 or bfloat16).
      mesh: whose devices share the queries; None for one device. If it spans several
        processes, each of them must make the same call.
    """

    query_ids: ArrayLike | None
    gallery_ids: ArrayLike | None
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
    for rows, ranks in _ranks(query, query_labels, gallery, gallery_labels, first=True, **options):
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
      per_class, one dict per class, worst classes first; with `clustering` nmi and ami.

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
    for rows, ranks in _ranks(query, query_labels, gallery, gallery_labels, **options):
        matches = np.isfinite(ranks).sum(1)
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


def summarize(
    measured: dict[str, np.ndarray],
    labels: ArrayLike,
    bootstrap: int = 0,
    per_class: bool = False,
    seed: int = 0,
) -> dict:
    """Means of the metrics [Q] of every query, NaN where one does not count; see `evaluate`.

    >>> summarize({"map": np.array([1, 0.5, np.nan])}, ["a", "a", "b"])
    {'map': 0.75, 'queries': 2, 'excluded': 1}
    """
    table, labels = np.stack(list(measured.values()), 1), as_labels("labels", labels)
    rows = ~np.isnan(table).all(1)
    classes, code, queries = np.unique(labels[rows], return_inverse=True, return_counts=True)

    def per_label(values):
        return np.stack([np.bincount(code, column[rows]) for column in values.T], 1)

    def named(values):
        return dict(zip(measured, values.tolist(), strict=True))

    sums, count = per_label(np.nan_to_num(table)), per_label(~np.isnan(table))
    result = named(sums.sum(0) / count.sum(0))
    result |= {"queries": int(rows.sum()), "excluded": int((~rows).sum())}
    if bootstrap:
        result["confidence"] = named(confidence_intervals(sums, count, bootstrap, seed).T)
    if per_class:
        means = sums / np.where(count > 0, count, np.nan)
        result["per_class"] = [
            {"class": classes[c].item(), "queries": int(queries[c]), **named(means[c])}
            for c in np.lexsort(means.T[::-1])
        ]
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
    code, gallery_code = shared_codes("labels", query_labels, gallery_labels)
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


def _ranks(
    query: ArrayLike,
    query_labels: ArrayLike,
    gallery: ArrayLike | None,
    gallery_labels: ArrayLike | None,
    *,
    query_ids: ArrayLike | None = None,
    gallery_ids: ArrayLike | None = None,
    precision: str = "highest",
    mesh: Mesh | None = None,
    first: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`ranking.ranks_of_positives` of embeddings with labels; ValueError for bad input."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, not {precision!r}")
    query, query_labels = _check("query", query, query_labels)
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("give both gallery and gallery_labels, or neither")
    if gallery is None or gallery_labels is None:
        if gallery_ids is not None:
            raise ValueError("gallery_ids without a gallery")
        gallery, gallery_labels = query, query_labels
        query_ids = gallery_ids = np.arange(len(query)) if query_ids is None else query_ids
    else:
        gallery, gallery_labels = _check("gallery", gallery, gallery_labels)
        if query.shape[1] != gallery.shape[1]:
            raise ValueError(
                f"query and gallery must have embeddings of one size, got {query.shape} "
                f"and {gallery.shape}"
            )
        if (query_ids is None) != (gallery_ids is None):
            raise ValueError("give both query_ids and gallery_ids, or neither")
    own = np.full(len(query), -1)
    if query_ids is not None and gallery_ids is not None:
        own = own_index(query_ids, gallery_ids, len(query), len(gallery))
    relevance = _same_label(query_labels, gallery_labels, own)
    if not relevance.matches.any():
        raise ValueError(
            f"none of the {len(query)} queries has a true match among the {len(gallery)} gallery "
            "items: check that both are labelled alike"
        )
    yield from ranks_of_positives(
        query, gallery, relevance, first=first, precision=precision, mesh=mesh
    )


def _same_label(query_labels, gallery_labels, own):
    """`Relevance` by labels; ``own`` [Q] is where the query itself is, -1 for nowhere."""
    code, gallery_code = shared_codes("labels", query_labels, gallery_labels)
    members = np.bincount(gallery_code, minlength=code.max() + 1)
    end = np.cumsum(members)[code]
    positives = Places(np.argsort(gallery_code, kind="stable"), end - members[code], end)
    at = np.arange(len(own))
    ignored = Places(own, at, at + (own >= 0))
    matches = members[code] - ((own >= 0) & (gallery_code[own] == code))
    return Relevance(positives, ignored, matches)


def _merge(array, options):
    """The rows of all processes that share the queries."""
    mesh = options.get("mesh")
    return array if mesh is None else processes.merge_rows(array, mesh)


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
