"""Groups of images that are nearly the same."""

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cgd_jax import retrieval
from cgd_jax.runtime.errors import InputError
from cgd_jax.search.index import Index
from cgd_jax.search.stores import Hit

# Of the packaged network; docs/searching.md has the copies and the look-alikes above it.
SIMILARITY = 0.94
# Of an image that may be near; and that are looked at if more are: groups hang together by chains.
CANDIDATES, NEIGHBOURS = 100, 16
DIRECTIONS, SAMPLE = 128, 4096  # that are looked at first, and images that they are found by
BLOCK, TILE = 256, 4096  # rows and columns that are compared at a time, in the cache


class Group(NamedTuple):
    """Images that are nearly the same."""

    similarity: float  # the least of an image to its nearest in the group
    members: list[Hit]  # with the similarity to the nearest in the group, highest first


def find_duplicates(
    index: Index, similarity: float = SIMILARITY, where: str | None = None
) -> list[Group]:
    """Finds groups of images that are chained together by high similarities.

    Names of one file, links to it, are no duplicates: the first counts. All that `where` selects
    are compared with all in memory, which takes the square of their number. `similarity` is the
    cosine from which two count as nearly the same, which depends on the network. Returns the
    groups, the most similar first, then the largest. Raises InputError for a similarity outside of
    (0, 1].
    """
    if not 0 < similarity <= 1:
        raise InputError(f"--similarity={similarity}: must be above 0 and at most 1.")
    names, vectors = index.vectors(where)
    ids, links, hits = np.array(names), np.zeros(0, int), {}
    while True:  # until there are no links
        ids, vectors = np.delete(ids, links), np.delete(vectors, links, 0)
        if len(ids) < 2:
            return []
        nearest, group_of = _chained(vectors, similarity)
        members = np.flatnonzero(nearest)
        hits |= index.hits(set(ids[members].tolist()) - hits.keys())
        links = _links(members, [hits[id].path if id in hits else "" for id in ids[members]])
        if not links.size:
            break
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


def _chained(vectors: np.ndarray, similarity: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns of [N, D] vectors the similarity to the nearest, 0 if below, and the group [N]."""
    rows, columns, values = map(np.concatenate, zip(*_near(vectors, similarity), strict=True))
    nearest, count = np.zeros(len(vectors)), len(vectors)
    np.maximum.at(nearest, rows, values)
    np.maximum.at(nearest, columns, values)
    graph = coo_array((values, (rows, columns)), (count, count))
    return nearest, connected_components(graph, directed=False)[1]


def _near(vectors: np.ndarray, similarity: float) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields rows, columns and similarities of what is near, some rows of [N, D] at a time.

    Of vectors in any orthogonal basis, some numbers are never farther apart than all of them:
    along the principal directions, few tell nearly all pairs apart.
    """
    similarity -= 1e-5  # by rounding, two equal images may be below 1
    count = len(vectors)
    some = vectors[:: -(-count // SAMPLE)]
    middle = some.mean(0)
    spread = (some - middle).T @ (some - middle)
    drawn = np.random.default_rng(0).standard_normal((len(middle), DIRECTIONS), np.float32)
    basis = np.linalg.qr(spread @ (spread @ drawn))[0]  # about the principal directions
    short = (vectors - middle) @ basis
    half, ones = -(short**2).sum(1, keepdims=True) / 2, np.ones((count, 1), np.float32)
    # Their product is minus half of the squared distance, which of unit vectors is 1 - cosine.
    left, right = np.hstack([short, half, ones]), np.hstack([short, ones, half]).T
    before = True  # whether what is near to rows before has been found with them
    for at in range(0, count, BLOCK):
        block, found, many = np.arange(at, min(at + BLOCK, count)), [], False
        for start in range(at if before else 0, count, TILE):
            near = left[block] @ right[:, start : start + TILE] >= similarity - 1 - 1e-4
            pairs = np.argwhere(near) + [at, start]
            found.append(pairs[pairs[:, 0] != pairs[:, 1]])
            if many := sum(map(len, found)) > CANDIDATES * len(block):
                break
        if many:
            before = False
            k = min(NEIGHBOURS, count - 1)
            values, columns = retrieval.top_k(vectors[block], vectors, k, exclude=block)
            rows, columns, values = np.repeat(block, k), columns.ravel(), values.ravel()
        else:
            rows, columns = np.concatenate(found).T
            values = np.vecdot(vectors[rows], vectors[columns])
        near = values >= similarity
        yield rows[near], columns[near], values[near]


def _links(rows: np.ndarray, paths: list[str]) -> np.ndarray:
    """Returns the rows of which the file is that of another path, which stands before it."""
    seen, links = set(), []
    for path, row in sorted(zip(paths, rows.tolist(), strict=True)):
        with contextlib.suppress(OSError, ValueError):  # gone, or never a file
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                links.append(row)
            seen.add((status.st_dev, status.st_ino))
    return np.array(links, int)
