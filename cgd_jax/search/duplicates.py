"""Groups of images that are nearly the same."""

from collections import defaultdict
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cgd_jax import retrieval
from cgd_jax.runtime.errors import InputError
from cgd_jax.search.index import Index
from cgd_jax.search.stores import Hit

__all__ = ["SIMILARITY", "Group", "find_duplicates"]

# Of the packaged network; docs/searching.md has the copies and the look-alikes above it.
SIMILARITY = 0.94
NEIGHBOURS = 16  # of every image that are looked at; larger groups hang together by chains


class Group(NamedTuple):
    """Images that are nearly the same."""

    similarity: float  # the least of an image to its nearest in the group
    members: list[Hit]  # with the similarity to the nearest in the group, highest first


def find_duplicates(
    index: Index, similarity: float = SIMILARITY, where: str | None = None
) -> list[Group]:
    """Finds groups of images that are chained together by high similarities.

    All that `where` selects are compared with all in memory, which takes the square of their
    number. `similarity` is the cosine from which two count as nearly the same, which depends on the
    network. Returns the groups, the most similar first, then the largest. Raises InputError for a
    similarity outside of (0, 1].
    """
    if not 0 < similarity <= 1:
        raise InputError(f"--similarity={similarity}: must be above 0 and at most 1.")
    ids, vectors = index.vectors(where)
    if len(ids) < 2:
        return []
    k = min(NEIGHBOURS, len(ids) - 1)
    values, neighbours = retrieval.top_k(vectors, vectors, k, exclude=np.arange(len(ids)))
    # By rounding, two equal images may be below 1.
    near = values >= similarity - 1e-5
    rows, columns = np.nonzero(near)[0], neighbours[near]
    nearest = np.zeros(len(ids))
    np.maximum.at(nearest, rows, values[near])
    np.maximum.at(nearest, columns, values[near])
    graph = coo_array((values[near], (rows, columns)), (len(ids), len(ids)))
    group_of = connected_components(graph, directed=False)[1]
    members = np.flatnonzero(nearest)
    hits = index.hits(ids[i] for i in members)
    groups = defaultdict(list)
    for i in members:
        if ids[i] in hits:  # it may have gone meanwhile
            hit = hits[ids[i]]._replace(similarity=min(float(nearest[i]), 1.0))
            groups[group_of[i]].append(hit)
    found = []
    for group in groups.values():
        group.sort(key=lambda hit: (-hit.similarity, hit.path))
        found.append(Group(group[-1].similarity, group))
    return sorted(found, key=lambda group: (-group.similarity, -len(group.members)))
