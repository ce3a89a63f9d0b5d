"""Retrieval metrics, exact and in bounded memory, with their uncertainty.

All follow from the ranks at which a query's true matches stand, see `ranking`. Here a true match
is a gallery item with the query's label. Similarity is cosine.

Embeddings, query [Q, D] and gallery [G, D], are of any real dtype and are L2-normalized here, in
float32. Labels, [Q] and [G], are integers or strings. Without a gallery the queries are searched,
where none finds itself. A ValueError says what is empty, not finite, does not fit, or that no
query has a true match; queries without one are left out of every mean.

Options are `query_ids` [Q] and `gallery_ids` [G], integers or strings: a gallery item with the
query's id is the query itself and is not searched (without a gallery the position is the id; with
one and no ids, nothing is left out; copies under other ids are neighbours like any other). And
`precision` of the product, as for `retrieval.top_k`; `mesh`, whose devices share the queries, and
whose processes all make the same call.

Ties: a gallery item of another class within `ranking.TIE` of a true match's cosine ranks before
it, so that a model that maps everything to one point scores 0.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cgd_jax.labels import as_labels, own_index, shared_codes
from cgd_jax.ranking import Relevance, check_matches, measure_ranks
from cgd_jax.retrieval import check_pair

__all__ = [
    "confidence_intervals",
    "evaluate",
    "first_ranks",
    "recall_at_k",
    "recall_of_ranking",
    "summarize",
]


def recall_at_k(
    query: ArrayLike,
    query_labels: ArrayLike,
    gallery: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
    ks: Sequence[int] = (1, 2, 4, 8),
    **options: Any,
) -> dict[int, float]:
    """Share of the queries with a true match that find one among the k nearest, {k: share}.

    Faster than `evaluate`, since the first true match's rank is enough.

    >>> recall_at_k([[1, 0], [1, 0.1], [0, 1], [0.9, 0.3]], ["cat", "cat", "dog", "dog"], ks=(1, 3))
    {1: 0.75, 3: 1.0}
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
    **options: Any,
) -> np.ndarray:
    """The rank of every query's first true match: [Q] float64, from 1; NaN where there is none.

    >>> first_ranks([[1, 0], [0, 1], [1, 1], [1, 0]], ["a", "b", "a", "c"])
    array([ 2., nan,  3., nan])
    """
    given = (query, query_labels, gallery, gallery_labels)
    return _per_query(lambda ranks: {"rank": ranks[:, 0]}, *given, first=True, **options)["rank"]


def evaluate(
    query: ArrayLike,
    query_labels: ArrayLike,
    gallery: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    bootstrap: int = 0,
    per_class: bool = False,
    seed: int = 0,
    **options: Any,
) -> dict:
    """Every metric of a ranking, with its uncertainty.

    `bootstrap` is how often classes are resampled, by `seed`, see `confidence_intervals`; 0 for
    none. `per_class` adds the means over the queries of each class.

    Returns:
      dict of plain numbers. With R the number of the query's true matches, means of:
        recall@k: 1 if a true match is among the first k.
        precision@k: share of true matches among the first k.
        r_precision: precision@R. map@r: mean over the first R places of the precision there
          if the place holds a true match, else 0 (https://arxiv.org/abs/2003.08505).
        map: mean over the true matches of the precision at their rank.
        mrr: 1 / rank of the first true match.
      And: queries, the number measured; excluded, the number without a true match;
      confidence, {metric: [low, high]}; per_class, one dict per class, worst classes
      first.

    >>> found = evaluate([[1.0, 0], [1, 0.1], [0, 1], [0.9, 0.3]], [0, 0, 1, 1], ks=(1,))
    >>> {name: round(value, 3) for name, value in found.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'recall@1': 0.75, 'precision@1': 0.75, 'r_precision': 0.75, 'map@r': 0.75, 'map': 0.833,
     'mrr': 0.833, 'queries': 4, 'excluded': 0}
    """
    given = (query, query_labels, gallery, gallery_labels)
    measured = _per_query(partial(_measure, ks=_check_ks(ks)), *given, **options)
    return summarize(measured, query_labels, bootstrap, per_class, seed)


def summarize(
    measured: dict[str, np.ndarray],
    labels: ArrayLike,
    bootstrap: int = 0,
    per_class: bool = False,
    seed: int = 0,
) -> dict:
    """What `evaluate` makes of every query's metrics [Q], which are NaN where one does not count.

    >>> summarize({"map": np.array([1, 0.5, np.nan])}, ["a", "a", "b"])
    {'map': 0.75, 'queries': 2, 'excluded': 1}
    """
    labels, values = as_labels("labels", labels), np.array(list(measured.values()))
    rows = ~np.isnan(values).all(0)
    classes, code, queries = np.unique(labels[rows], return_inverse=True, return_counts=True)
    per_label = lambda values: np.stack([np.bincount(code, column) for column in values], 1)
    sums = per_label(np.nan_to_num(values[:, rows]))
    count = per_label(~np.isnan(values[:, rows]))
    named = lambda values: dict(zip(measured, values.tolist(), strict=True))
    result = named(sums.sum(0) / count.sum(0))
    result |= {"queries": len(code), "excluded": len(labels) - len(code)}
    if bootstrap:
        result["confidence"] = named(confidence_intervals(sums, count, bootstrap, seed).T)
    if per_class:
        means = sums / np.where(count > 0, count, np.nan)
        result["per_class"] = [
            {"class": classes[c].item(), "queries": int(queries[c]), **named(means[c])}
            for c in np.lexsort(means.T[::-1])
        ]
    return result


def _measure(ranks: np.ndarray, ks: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Metrics [B] of ranks [B, M], in ascending order and infinite behind the last."""
    is_match = np.isfinite(ranks)
    matches = is_match.sum(1)
    place = np.arange(1, ranks.shape[1] + 1)
    precision = np.where(is_match, place / ranks, 0.0)
    within = ranks <= matches[:, None]
    return {
        **{f"recall@{k}": ranks[:, 0] <= k for k in ks},
        **{f"precision@{k}": np.sum(ranks[:, :k] <= k, 1) / k for k in ks},
        "r_precision": within.sum(1) / matches,
        "map@r": np.sum(precision * within, 1) / matches,
        "map": np.sum(precision, 1) / matches,
        "mrr": 1 / ranks[:, 0],
    }


def recall_of_ranking(
    index: ArrayLike,
    query_labels: ArrayLike,
    gallery_labels: ArrayLike,
    ks: Sequence[int] = (1, 2, 4, 8),
    itself: ArrayLike = False,
) -> dict[int, float]:
    """`recall_at_k` of rankings that do not come from embeddings, as `rerank.k_reciprocal`'s.

    `index` [Q, K] are gallery items in order, the query itself left out; K is at least every k.
    `itself`, bool or [Q] bools, says where the gallery holds the query itself.

    >>> recall_of_ranking([[2, 0], [1, 2]], ["a", "b"], ["b", "c", "a"], ks=(1, 2))
    {1: 0.5, 2: 0.5}
    """
    index, ks = np.asarray(index), _check_ks(ks)
    code, gallery_code = shared_codes("labels", query_labels, gallery_labels)
    if index.ndim != 2 or code.shape != index.shape[:1] or max(ks) > index.shape[1]:
        raise ValueError(
            f"index must be [Q, K] with K at least {max(ks)} and query_labels [Q], got "
            f"{index.shape} and {code.shape}"
        )
    matches = np.bincount(gallery_code, minlength=code.max() + 1)[code] - np.asarray(itself)
    check_matches(matches, len(gallery_code))
    hit = gallery_code[index[matches > 0]] == code[matches > 0, None]
    return {k: float(np.mean(hit[:, :k].any(1))) for k in ks}


def confidence_intervals(
    sums: np.ndarray, count: np.ndarray, resamplings: int = 1000, seed: int = 0
) -> np.ndarray:
    """95 % intervals, [2, M], of means over queries, by a percentile bootstrap over classes.

    Images of one class are alike, so that classes and not queries are drawn anew, each with all
    of its queries (cluster bootstrap, Field and Welsh 2007). Of M metrics, sums [C, M] are those
    over the queries of each class, which are count [C], or [C, M] if not all count for all.

    >>> right, queries = np.array([[9.0], [5.0], [7.0]]), np.array([10, 10, 10])
    >>> confidence_intervals(right, queries)[:, 0].round(2)
    array([0.5, 0.9])
    """
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(resamplings):
        times = np.bincount(rng.integers(0, len(count), len(count)), minlength=len(count))
        drawn = times @ count
        means.append(times @ sums / np.where(drawn > 0, drawn, np.nan))
    return np.nanquantile(means, [0.025, 0.975], axis=0)


def _per_query(measure, *searched, query_ids=None, gallery_ids=None, **options):
    """What `measure` makes of each query's ranks: {name: [Q]}, NaN without a true match."""
    query, query_labels, gallery, gallery_labels = searched
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("give both gallery and gallery_labels, or neither")
    check_pair(query, query if gallery is None else gallery, options.get("precision", "highest"))
    if gallery is None:
        gallery, gallery_labels = query, query_labels
        if gallery_ids is None:
            query_ids = gallery_ids = np.arange(len(query)) if query_ids is None else query_ids
    if (query_ids is None) != (gallery_ids is None):
        raise ValueError("give both query_ids and gallery_ids, or neither")
    code, gallery_code = shared_codes("labels", query_labels, gallery_labels)
    for x, labels in ((query, code), (gallery, gallery_code)):
        if labels.shape != np.shape(x)[:1]:
            raise ValueError(f"labels must be one per row: {np.shape(x)}, labels {labels.shape}")
    own = np.full(len(query), -1)  # where the query itself is, -1 for nowhere
    if query_ids is not None:
        own = own_index(query_ids, gallery_ids, len(query), len(gallery))
    itself, members = own >= 0, np.bincount(gallery_code, minlength=code.max() + 1)
    by_class = np.split(np.argsort(gallery_code, kind="stable"), np.cumsum(members)[:-1])
    relevance = Relevance(
        positives=[by_class[c] for c in code],
        ignored=[own[q : q + known] for q, known in enumerate(itself.tolist())],
        matches=members[code] - (itself & (gallery_code[own] == code)),
    )
    return measure_ranks(measure, query, gallery, relevance, **options)


def _check_ks(ks):
    ks = tuple(ks)
    if not ks or any(k != int(k) or k < 1 for k in ks):
        raise ValueError(f"ks must be whole numbers from 1, got {ks}")
    return tuple(int(k) for k in ks)
