"""How descriptors complement one another: what each branch finds alone, and all together.

The embedding of `combination`'s "concat" and "separate" is its branches side by side, so
that its n equal parts search by themselves without the network running again. Branches
that find the same neighbours and err on the same queries add nothing to one another.

Nothing here grows with queries × gallery: `retrieval.top_k` and `metrics` stream both.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cgd_jax import metrics, retrieval
from cgd_jax.labels import as_labels, own_index
from cgd_jax.retrieval import normalize

__all__ = ["measure"]


def measure(
    query: ArrayLike,
    query_labels: ArrayLike,
    gallery: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
    *,
    names: Sequence[str],
    k: int = 10,
    bootstrap: int = 1000,
    seed: int = 0,
    **options: Any,
) -> dict:
    """Measures how the branches of an embedding agree, err, and gain from being combined.

    A branch, or the combination, is right about a query if `metrics` counts it into R@1:
    a true match is the nearest neighbour, and no other class ties with it.

    Args:
      query: [Q, D], the branches side by side; and query_labels, gallery, gallery_labels, options:
        as for `metrics.evaluate`, whose ValueErrors are raised.
      names: of the n > 1 branches, in their order; ValueError unless n divides D.
      k: neighbours to compare; as many as there are if there are fewer.
      bootstrap: resamplings of the classes, drawn by `seed`, for the 95 % interval of the gain.
      **options: those of `metrics`.

    Returns:
      dict of plain numbers, over the queries that have a true match:
        queries: how many these are. k: neighbours that were compared.
        branches: {name: R@1 alone}. combined: R@1 of the whole embedding. any_branch: share
          of queries that at least one branch is right about.
        pairs: for every two branches {"branches": [a, b]; "overlap": mean share of
          common ones among their k nearest neighbours; "error_correlation": phi
          coefficient of their being wrong, None if one always or never is}.
        best_branch: the name with the highest R@1, the first of equals.
        gain: {"total": combined minus best branch; "confidence": its [low, high];
          "won", "lost": queries that only the one, only the other is right about}.
        outcomes: for every set of branches that are right about some query, largest first,
          {"right": [names]; "queries"; "combined_right": so many of these; "gain": won
          minus lost among them}.

    >>> bits = np.array([[0, 0], [0, 1], [1, 0], [1, 1]] * 2)  # a class each
    >>> branches = [np.eye(2)[bit] for bit in bits.T]  # each tells two classes from two others
    >>> found = measure(np.hstack(branches), ["a", "b", "c", "d"] * 2, names=("left", "right"))
    >>> found["branches"], found["combined"]
    ({'left': 0.0, 'right': 0.0}, 1.0)
    """
    query = np.asarray(query)
    if len(names) < 2 or query.ndim != 2 or query.shape[1] % len(names):
        raise ValueError(
            f"an embedding [N, D] of two or more branches of one size is needed; got "
            f"{query.shape} for the branches {', '.join(names)}"
        )
    if gallery is None and gallery_labels is None:
        gallery, gallery_labels, ids = query, query_labels, options.get("query_ids")
        ids = np.arange(len(query)) if ids is None else ids
        options = {"gallery_ids": ids, **options, "query_ids": ids}
    gallery = np.asarray(gallery)

    def first_ranks(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
        return metrics.first_ranks(query, query_labels, gallery, gallery_labels, **options)

    ranks = first_ranks(query, gallery)
    rows = np.flatnonzero(np.isfinite(ranks))
    combined = ranks[rows] == 1
    own = None  # where in the gallery each query itself is
    query_ids, gallery_ids = options.get("query_ids"), options.get("gallery_ids")
    if query_ids is not None and gallery_ids is not None:
        own = own_index(query_ids, gallery_ids, len(query), len(gallery))[rows]
    k = min(k, len(gallery) - (own is not None))
    mesh, precision = options.get("mesh"), options.get("precision", "highest")
    right, found = [], []
    for part, other in zip(*(np.split(x, len(names), 1) for x in (query, gallery)), strict=True):
        right.append(first_ranks(part, other)[rows] == 1)
        part, other = np.asarray(normalize(part)), np.asarray(normalize(other))
        nearest = retrieval.top_k(part[rows], other, k, exclude=own, precision=precision, mesh=mesh)
        found.append(nearest[1])

    pairs = [
        {
            "branches": [names[i], names[j]],
            "overlap": float((found[i][:, :, None] == found[j][:, None]).any(2).mean()),
            "error_correlation": _phi(~right[i], ~right[j]),
        }
        for i, j in combinations(range(len(names)), 2)
    ]
    best = int(np.argmax([r.mean() for r in right]))
    difference = combined.astype(int) - right[best]
    labels = as_labels("query_labels", query_labels)
    _, code = np.unique(labels[rows], return_inverse=True)
    sums = np.bincount(code, difference)[:, None]
    low, high = metrics.confidence_intervals(sums, np.bincount(code), bootstrap, seed)
    return {
        "queries": len(rows),
        "k": int(k),
        "branches": {name: float(r.mean()) for name, r in zip(names, right, strict=True)},
        "any_branch": float(np.any(right, 0).mean()),
        "combined": float(combined.mean()),
        "pairs": pairs,
        "best_branch": names[best],
        "gain": {
            "total": float(difference.mean()),
            "confidence": [float(low[0]), float(high[0])],
            "won": int(np.sum(difference == 1)),
            "lost": int(np.sum(difference == -1)),
        },
        "outcomes": _outcomes(names, np.array(right), combined, difference),
    }


def _phi(a: np.ndarray, b: np.ndarray) -> float | None:
    """Correlation of two [Q] bools (Pearson's, called phi); None if one of them is constant."""
    if a.all() or b.all() or not (a.any() and b.any()):
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _outcomes(names, right, combined, difference):
    """Counts queries by the set of branches, right [n, Q], that are right about them."""
    sets, code = np.unique(right, axis=1, return_inverse=True)
    rows = [
        {
            "right": [name for name, is_right in zip(names, some, strict=True) if is_right],
            "queries": int(np.sum(code == i)),
            "combined_right": int(np.sum(combined[code == i])),
            "gain": int(np.sum(difference[code == i])),
        }
        for i, some in reversed([*enumerate(sets.T)])  # of equally many the first names first
    ]
    return sorted(rows, key=lambda row: -len(row["right"]))
