"""Groups of pictures that are nearly the same."""

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from cgd_jax.search.index import Index
from cgd_jax.search.stores import Hit

__all__ = ["SIMILARITY", "Group", "find_duplicates"]

# Of the packaged network; docs/searching.md has the copies and the look-alikes above it.
SIMILARITY = 0.94
NEIGHBOURS = 16  # of every picture that are looked at; larger groups hang together by chains
EXACT_UP_TO = 50_000  # pictures: comparing all with all takes the square of their number
BLOCK = 256  # pictures that are searched by at a time


class Group(NamedTuple):
    """Pictures that are nearly the same."""

    similarity: float  # the least of a picture to its nearest in the group
    members: list[Hit]  # with the similarity to the nearest in the group, highest first


def find_duplicates(
    index: Index, similarity: float = SIMILARITY, where: str | None = None, exact: bool = False
) -> list[Group]:
    """Finds groups of pictures that are chained together by high similarities.

    Args:
      index: to look through.
      similarity: cosine from which two pictures count as nearly the same. What that means
        depends on the network.
      where: which pictures to look at, as for `Index.search`.
      exact: whether to compare all with all, however many there are.

    Returns:
      The groups, the most similar first, then the largest.

    Raises:
      ValueError: a similarity outside of (0, 1], or `where` is not understood.
      StoreError: the index cannot be read.
    """
    if not 0 < similarity <= 1:
        raise ValueError(f"--similarity={similarity}: must be above 0 and at most 1.")
    hits, vectors = index.in_memory(where)
    if len(hits) < 2:
        return []
    parent = list(range(len(hits)))
    nearest = np.zeros(len(hits))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j, value in _pairs(index, hits, vectors, where, exact):
        if value >= similarity - 1e-5:  # by rounding, two equal pictures may be below 1
            parent[root(i)] = root(j)
            nearest[i], nearest[j] = max(nearest[i], value), max(nearest[j], value)
    groups = defaultdict(list)
    for i, hit in enumerate(hits):
        if nearest[i]:
            groups[root(i)].append(hit._replace(similarity=min(float(nearest[i]), 1.0)))
    found = []
    for members in groups.values():
        members.sort(key=lambda hit: (-hit.similarity, hit.path))
        found.append(Group(members[-1].similarity, members))
    return sorted(found, key=lambda group: (-group.similarity, -len(group.members)))


def _pairs(index: Index, hits: list[Hit], vectors: np.ndarray, where: str | None, exact: bool):
    """Yields (row, row, similarity) of every picture and its nearest."""
    k = min(NEIGHBOURS, len(hits) - 1)
    if exact or len(hits) <= EXACT_UP_TO:
        from cgd_jax import retrieval

        similarity, at = retrieval.top_k(vectors, vectors, k, exclude=np.arange(len(hits)))
        for i, (values, columns) in enumerate(zip(similarity, at, strict=True)):
            yield from ((i, int(j), float(s)) for s, j in zip(values, columns, strict=True))
        return
    row_of = {hit.id: i for i, hit in enumerate(hits)}
    for start in range(0, len(hits), BLOCK):
        found = index.search_vectors(vectors[start : start + BLOCK], k + 1, where)
        for i, neighbours in enumerate(found, start):
            for hit in neighbours:
                j = row_of.get(hit.id, i)  # it may have come meanwhile
                if j != i:
                    yield i, j, hit.similarity
