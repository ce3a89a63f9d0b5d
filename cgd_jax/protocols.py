"""Landmarks and places: retrieval metrics by the rules of their benchmarks.

What is right here is no class but a list: the positives of every query, and perhaps items that
are ignored for it. As in `metrics`, everything follows from the exact ranks at which positives
stand, ignored items taken out; see `ranking`. Similarity is cosine.

All metrics take embeddings, `query` [Q, D] and `gallery` [G, D] of any real dtype and length, and
lists of positions in the gallery, one for every query. They return {metric: [Q]}, a number for
every query, NaN for one that the benchmark does not count; its `means` are what is published.
Options are `precision` and `mesh`, as of `metrics`. ValueError is raised for embeddings
or lists that do not fit, or if no query has a positive.

>>> query, gallery = [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.1], [0.1, 1.0], [1.0, 0.3]]
>>> means(places(query, gallery, [[2], [1]], ks=(1, 2)))
{'recall@1': 0.5, 'recall@2': 1.0}

Ties: an item within ``TIE`` of a positive's cosine ranks before it. The benchmarks' own programs
leave the order of ties to their sort; of what they may report, this is the least.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cgd_jax.ranking import Relevance, measure_ranks

__all__ = ["landmarks", "means", "ndcg", "places", "relevance", "revisited"]

Lists = Sequence[ArrayLike]  # for every query positions in the gallery
Metrics = dict[str, np.ndarray]  # name → [Q]


def revisited(
    query: ArrayLike,
    gallery: ArrayLike,
    easy: Lists,
    hard: Lists,
    junk: Lists,
    ks: Sequence[int] = (1, 5, 10),
    **options: Any,
) -> Metrics:
    """The protocol of the revisited Oxford and Paris: mean AP and mP@k, easy, medium and hard.

    Radenović et al., CVPR 2018, https://arxiv.org/abs/1803.11285. Easy ignores hard images, hard
    ignores easy ones, medium finds both; junk is always ignored. AP is the area under the curve of
    precision over recall, of trapezoids; mP@k the precision among the first k, or up to the last
    positive if that comes earlier. A setup counts the queries that have positives in it.

    Returns {"map_easy", "mp@1_easy", …, "map_medium", …, "map_hard", …}, and "recall@k" of medium.

    >>> query, gallery = [[1.0, 0.0]], [[1.0, 0.1], [1.0, 0.2], [1.0, 0.3]]
    >>> found = revisited(query, gallery, easy=[[1]], hard=[[2]], junk=[[0]], ks=(1,))
    >>> {name: float(value[0]) for name, value in found.items() if "map" in name}
    {'map_easy': 1.0, 'map_medium': 1.0, 'map_hard': 1.0}
    """

    def measure(ranks):
        matches, place = np.isfinite(ranks).sum(1), np.arange(1, ranks.shape[1] + 1)
        before = np.where(ranks > 1, (place - 1) / np.maximum(ranks - 1, 1), 1.0)
        found = {"map": np.sum(before + place / ranks, 1) / 2 / matches}
        last = ranks[np.arange(len(ranks)), matches - 1]
        for k in ks:
            seen = np.minimum(last, k)
            found[f"mp@{k}"] = np.sum(ranks <= seen[:, None], 1) / seen
        return found | _recalls(ks, ranks)

    def together(first, second):
        return [[*a, *b] for a, b in zip(first, second, strict=True)]

    setups = {"easy": (easy, together(junk, hard)), "medium": (together(easy, hard), junk)}
    setups |= {"hard": (hard, together(junk, easy))}
    found = {}
    for setup, (positives, ignored) in setups.items():
        measured = _measure(measure, query, gallery, positives, ignored, **options)
        found |= {f"{name}_{setup}": measured[name] for name in measured if "recall" not in name}
        if setup == "medium":
            found |= {name: measured[name] for name in measured if "recall" in name}
    return found


def landmarks(
    query: ArrayLike,
    gallery: ArrayLike,
    positives: Lists,
    usage: Sequence[str] | None = None,
    ks: Sequence[int] = (1, 5, 10),
    depth: int = 100,
    **options: Any,
) -> Metrics:
    """The protocol of Google Landmarks v2: the mean average precision of the first hundred.

    Weyand et al., CVPR 2020, https://arxiv.org/abs/2004.01804: the sum of the precisions at the
    positives among the first 100, divided by the number of all positives, 100 at most.

    Args:
      query: and gallery, positives: embeddings and lists. A query without any does not count.
      usage: [Q], the part that each query belongs to, such as "Public"; None: of one part.
      ks: of R@k, which is not of the protocol.
      depth: how many of the first items count.

    Returns:
      {"map@100", "recall@1", …}; with `usage` also "map@100_public", ….

    >>> found = landmarks([[1.0, 0.0]], [[1.0, 0.1], [1.0, 0.2], [1.0, 0.3]], [[0, 2]])
    >>> round(means(found)["map@100"], 3)
    0.833
    """

    def measure(ranks):
        precision = np.where(ranks <= depth, np.arange(1, ranks.shape[1] + 1) / ranks, 0.0)
        most = np.minimum(np.isfinite(ranks).sum(1), depth)
        return {f"map@{depth}": precision.sum(1) / most} | _recalls(ks, ranks)

    found = _measure(measure, query, gallery, positives, **options)
    for part in () if usage is None else np.unique(usage):
        is_part = np.asarray(usage) == part
        found[f"map@{depth}_{part.lower()}"] = np.where(is_part, found[f"map@{depth}"], np.nan)
    return found


def places(
    query: ArrayLike,
    gallery: ArrayLike,
    positives: Lists,
    ks: Sequence[int] = (1, 5, 10, 20),
    *,
    lost: float = 0.0,
    **options: Any,
) -> Metrics:
    """The protocol of place recognition: whether one of the first k items is near the query.

    Args:
      query: and gallery, positives: embeddings and lists, see `geography.near`.
      ks: the values of k.
      lost: what a query without positives counts as: 0, as a miss, as most benchmarks have it; or
        NaN, not at all, as that of Mapillary has it.

    >>> query, gallery = [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.1], [0.1, 1.0]]
    >>> means(places(query, gallery, [[0], []], ks=(1,)))
    {'recall@1': 0.5}
    >>> means(places(query, gallery, [[0], []], ks=(1,), lost=np.nan))
    {'recall@1': 1.0}
    """
    found = _measure(partial(_recalls, ks), query, gallery, positives, first=True, **options)
    return {name: np.where(np.isnan(hit), lost, hit) for name, hit in found.items()}


def ndcg(
    query: ArrayLike,
    gallery: ArrayLike,
    positives: Lists,
    grades: Lists,
    depth: int | None = None,
    **options: Any,
) -> Metrics:
    """Normalized discounted cumulative gain, for positives of which some are better than others.

    Järvelin and Kekäläinen, TOIS 2002, https://doi.org/10.1145/582415.582418: an item at rank r
    gains its grade / log2(1 + r), and the sum is divided by that of the best order.

    Args:
      query: and gallery, positives: embeddings and lists.
      grades: for every query a number above 0 for each of its positives.
      depth: how many of the first items count, as in "ndcg@10"; None: all, as in "ndcg".

    >>> found = ndcg([[1.0, 0.0]], [[1.0, 0.1], [1.0, 0.2], [1.0, 0.3]], [[0, 1]], [[1, 2]])
    >>> round(means(found)["ndcg"], 3)
    0.86
    """
    rows = [(np.asarray(p), np.asarray(g, float)) for p, g in zip(positives, grades, strict=True)]
    if any(p.shape != g.shape or not (g > 0).all() or not np.isfinite(g).all() for p, g in rows):
        raise ValueError("grades must be finite and above 0, one for each positive of a query")

    def discount(ranks):
        return np.sum(np.where(ranks <= (depth or np.inf), 1 / np.log2(1 + ranks), 0), -1)

    # A grade is the sum of its steps: each is gained by all that reach it, which are ranked alone.
    gain = best = np.zeros(len(rows))
    levels = np.unique(np.concatenate([g for _, g in rows]))
    for level, step in zip(levels, np.diff(levels, prepend=0), strict=True):
        reach = [p[g >= level] for p, g in rows]
        found = _measure(lambda ranks: {"gain": discount(ranks)}, query, gallery, reach, **options)
        gain = gain + step * np.nan_to_num(found["gain"])
        best = best + step * np.array([discount(np.arange(1, len(p) + 1)) for p in reach])
    name = f"ndcg@{depth}" if depth else "ndcg"
    return {name: np.where(best > 0, gain / np.where(best > 0, best, 1), np.nan)}


def means(values: Metrics) -> dict[str, float]:
    """The mean of every metric [Q] over the queries that count, those that are not NaN.

    >>> means({"map": np.array([1.0, np.nan, 0.5])})
    {'map': 0.75}
    """
    return {name: float(np.nanmean(column)) for name, column in values.items()}


def relevance(positives: Lists, items: int, ignored: Lists | None = None) -> Relevance:
    """Makes what `ranking.measure_ranks` takes of lists of positions in a gallery of `items`.

    >>> relevance([[2, 0], []], items=3, ignored=[[0], [1]]).matches
    array([1, 0])
    """
    ignored = [()] * len(positives) if ignored is None else ignored
    if len(ignored) != len(positives):
        raise ValueError(f"{len(positives)} lists of positives, but {len(ignored)} of ignored")
    right, out = _places("positives", positives, items), _places("ignored", ignored, items)
    left = [len(np.setdiff1d(p, i)) for p, i in zip(right, out, strict=True)]
    return Relevance(right, out, np.array(left, int))


def _places(name: str, lists: Lists, items: int) -> list[np.ndarray]:
    rows = [np.unique(np.asarray(row)) for row in lists]
    for query, row in enumerate(rows):
        if row.size and (row.dtype.kind not in "iu" or row[0] < 0 or row[-1] >= items):
            raise ValueError(
                f"{name} of query {query} must be whole numbers from 0 to {items - 1}, positions "
                f"in the gallery; got {row.min()} to {row.max()} of {row.dtype}"
            )
    return [row.astype(int) for row in rows]


def _recalls(ks, ranks):
    return {f"recall@{k}": ranks[:, 0] <= k for k in ks}


def _measure(
    measure: Callable[[np.ndarray], Metrics],
    query: ArrayLike,
    gallery: ArrayLike,
    positives: Lists,
    ignored: Lists | None = None,
    **options: Any,
) -> Metrics:
    """What a function makes of each query's ranks, from [B, M] to {metric: [B]}."""
    if len(query) != len(positives):
        raise ValueError(f"{len(query)} queries, but {len(positives)} lists of positives")
    wanted = relevance(positives, len(gallery), ignored)
    return measure_ranks(measure, query, gallery, wanted, **options)
