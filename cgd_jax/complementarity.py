"""How descriptors complement one another: what each branch finds alone, and all together.

The embedding of `combination`'s "concat" and "separate" is its branches side by side, so
that its n equal parts search by themselves without the network running again. Branches
that find the same neighbours and err on the same queries add nothing to one another.

    complementarity.measure(embeddings, labels, names=("S", "G"))

Nothing here grows with queries × gallery: `retrieval.top_k` and `metrics` stream both.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from cgd_jax import metrics, retrieval

__all__ = ["measure", "outcomes", "overlap", "phi"]


def measure(
    query: ArrayLike,
    query_labels: ArrayLike,
    gallery: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
    *,
    names: Sequence[str],
    k: int = 10,
    query_ids: ArrayLike | None = None,
    gallery_ids: ArrayLike | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    precision: str = "highest",
    mesh: Mesh | None = None,
) -> dict:
    """Measures how the branches of an embedding agree, err, and gain from being combined.

    A branch, or the combination, is right about a query if `metrics` counts it into R@1:
    a true match is the nearest neighbour, and no other class ties with it.

    Args:
      query: [Q, D], the branches side by side; and query_labels, gallery, gallery_labels,
        query_ids, gallery_ids, precision, mesh: as for `metrics.evaluate`.
      names: of the n branches, in their order; n divides D.
      k: neighbours to compare; as many as there are if there are fewer.
      bootstrap: resamplings of the classes for the 95 % interval of the gain.
      seed: of the resampling.

    Returns:
      dict of plain numbers, over the queries that have a true match:
        queries: how many these are. k: neighbours that were compared.
        branches: {name: R@1 alone}. combined: R@1 of the whole embedding.
        any_branch: share of queries that at least one branch is right about, what a
          perfect choice among the branches would reach.
        pairs: for every two branches {"branches": [a, b]; "overlap": mean share of
          common ones among their k nearest neighbours; "error_correlation": phi
          coefficient of their being wrong, None if one always or never is}.
        best_branch: the name with the highest R@1, the first of equals.
        gain: {"total": combined minus best branch; "confidence": its [low, high];
          "won", "lost": queries that only the combination, only the best branch is
          right about}.
        outcomes: see `outcomes`; the gains in it add up to won - lost.

    Raises:
      ValueError: as `metrics.evaluate`; D that cannot be cut into n parts; fewer than two
        names.
    """
    query = np.asarray(query)
    if len(names) < 2 or query.ndim != 2 or query.shape[1] % len(names):
        raise ValueError(
            f"an embedding [N, D] of two or more branches of one size is needed; got "
            f"{query.shape} for the branches {', '.join(names)}"
        )
    own = None  # where in the gallery each query itself is
    if gallery is None:
        own = np.arange(len(query))
    else:
        gallery = np.asarray(gallery)
        if query_ids is not None and gallery_ids is not None:
            own = metrics.own_index(query_ids, gallery_ids, len(query), len(gallery))
    k = min(k, len(query if gallery is None else gallery) - (own is not None))

    def first_ranks(query, gallery):
        ids = {"query_ids": query_ids, "gallery_ids": gallery_ids}
        options = {**ids, "precision": precision, "mesh": mesh}
        return metrics.first_ranks(query, query_labels, gallery, gallery_labels, **options)

    ranks = first_ranks(query, gallery)
    rows = np.flatnonzero(np.isfinite(ranks))
    combined = ranks[rows] == 1
    right, found = [], []
    for part, gallery_part in zip(
        np.split(query, len(names), 1),
        [None] * len(names) if gallery is None else np.split(gallery, len(names), 1),
        strict=True,
    ):
        right.append(first_ranks(part, gallery_part)[rows] == 1)
        part = np.asarray(metrics.normalize(part))
        gallery_part = part if gallery is None else np.asarray(metrics.normalize(gallery_part))
        exclude = None if own is None else own[rows]
        _, index = retrieval.top_k(
            part[rows], gallery_part, k, exclude=exclude, precision=precision, mesh=mesh
        )
        found.append(index)

    pairs = [
        {
            "branches": [names[i], names[j]],
            "overlap": overlap(found[i], found[j]),
            "error_correlation": phi(~right[i], ~right[j]),
        }
        for i, j in combinations(range(len(names)), 2)
    ]
    best = int(np.argmax([r.mean() for r in right]))
    difference = combined.astype(int) - right[best]
    labels = metrics.as_labels("query_labels", query_labels)
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
        "outcomes": outcomes(names, np.array(right), combined, difference),
    }


def overlap(index: np.ndarray, other: np.ndarray) -> float:
    """Mean share of common ones among two lists of neighbours per query, [Q, k] each."""
    return float((index[:, :, None] == other[:, None, :]).any(2).mean())


def phi(a: np.ndarray, b: np.ndarray) -> float | None:
    """Correlation of two [Q] bools (Pearson's, called phi); None if one of them is constant."""
    if a.all() or b.all() or not (a.any() and b.any()):
        return None
    return float(np.corrcoef(a, b)[0, 1])


def outcomes(
    names: Sequence[str], right: np.ndarray, combined: np.ndarray, difference: np.ndarray
) -> list[dict]:
    """Counts queries by the set of branches that are right about them.

    Args:
      names: of n branches.
      right: [n, Q] bools, of the branches.
      combined: [Q] bools, of the combination.
      difference: [Q] integers, +1 for a query that is won, -1 for one that is lost.

    Returns:
      {"right": [names]; "queries"; "combined_right": so many of these; "gain": won minus
      lost among them} for every set of branches that some query belongs to, largest first.
    """
    sets, code = np.unique(right, axis=1, return_inverse=True)
    rows = [
        {
            "right": [name for name, is_right in zip(names, some, strict=True) if is_right],
            "queries": int(np.sum(code == i)),
            "combined_right": int(np.sum(combined[code == i])),
            "gain": int(np.sum(difference[code == i])),
        }
        for i, some in enumerate(sets.T)
    ]
    return sorted(
        rows, key=lambda row: (-len(row["right"]), [names.index(n) for n in row["right"]])
    )
