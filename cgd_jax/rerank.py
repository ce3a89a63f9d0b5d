"""What can be done to embeddings, or to a ranking, after the network and before the metrics.

Pure functions, applied in this order: whitening, database-side augmentation, α-query expansion,
k-reciprocal re-ranking. The first three give embeddings that `metrics` measures like any others;
the last gives, per query, a new order of its nearest gallery items.

Embeddings are of any real dtype and are L2-normalized here. `exclude` and `mesh` are as for
`retrieval.top_k`, whose ValueErrors all functions raise.
"""

import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike
from scipy import sparse

from cgd_jax.retrieval import check_matrix, check_rows, normalize, top_k

__all__ = [
    "augment_database",
    "expand_queries",
    "k_reciprocal",
    "learn_pair_whitening",
    "learn_whitening",
    "matching_pairs",
    "whiten",
]


def learn_whitening(embeddings: ArrayLike, dim: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Learns a PCA-whitening of L2-normalized embeddings (https://arxiv.org/abs/1210.1386).

    Of embeddings [N, D]; returns (mean [D], projection [D, dim]), float32, for `whiten`. Learn it
    on the training set: on the test set it would look at what is measured. `dim` leading components
    are kept, None is all with a variance above round-off; ValueError if these embeddings span less.

    >>> mean, projection = learn_whitening([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    >>> mean.shape, projection.shape  # three points span a plane
    ((3,), (3, 2))
    """
    x = _unit("embeddings", embeddings).astype(np.float64)
    mean = x.mean(0)
    x = x - mean
    variance, axes = np.linalg.eigh(x.T @ x / max(len(x) - 1, 1))
    variance, axes = variance[::-1], axes[:, ::-1]
    spanned = int(np.sum(variance > max(variance[0], 0) * 1e-7)) if variance[0] > 1e-12 else 0
    dim = spanned if dim is None else dim
    if not 1 <= dim <= spanned:
        raise ValueError(f"dim must be from 1 to {spanned}, which these embeddings span; got {dim}")
    projection = axes[:, :dim] / np.sqrt(variance[:dim])
    return mean.astype(np.float32), projection.astype(np.float32)


def learn_pair_whitening(
    embeddings: ArrayLike, pairs: ArrayLike, dim: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Learns a whitening from pairs of matching images (https://arxiv.org/abs/1711.02512, 3.4).

    Of embeddings [N, D] and pairs [P, 2], integers, the rows of a query and of what matches it;
    returns (mean [D] of the queries, projection [D, dim]), float32, for `whiten`. What differs
    within pairs becomes white, by an inverse root of its covariance; then the `dim`
    directions in which embeddings vary most are kept, None is all; ValueError for more than D.
    Fewer than D pairs leave directions in which none differs, which count as if they differed a
    little. Learn it on other images.

    >>> mean, projection = learn_pair_whitening([[1, 0], [0, 1], [1, 1]], [[0, 2], [1, 2]], dim=1)
    >>> mean.shape, projection.shape
    ((2,), (2, 1))
    """
    x, pairs = _unit("embeddings", embeddings).astype(np.float64), np.asarray(pairs)
    size = x.shape[1]
    if pairs.shape != (len(pairs), 2) or pairs.dtype.kind not in "iu" or not len(pairs):
        raise ValueError(f"pairs must be integers [P, 2]; got {pairs.dtype} {pairs.shape}")
    if not 0 <= pairs.min() <= pairs.max() < len(x):
        raise ValueError(f"pairs must be rows below {len(x)}; got {pairs.min()} to {pairs.max()}")
    dim = size if dim is None else dim
    if not 1 <= dim <= size:
        raise ValueError(f"dim must be from 1 to {size}, the length of the embeddings; got {dim}")
    mean = x[pairs[:, 0]].mean(0)
    difference = x[pairs[:, 0]] - x[pairs[:, 1]]
    variance, axes = np.linalg.eigh(difference.T @ difference / len(pairs))
    within = axes / np.sqrt(np.maximum(variance, 1e-10))
    white = (x - mean) @ within
    axes = np.linalg.eigh(white.T @ white)[1][:, ::-1]
    return mean.astype(np.float32), (within @ axes[:, :dim]).astype(np.float32)


def matching_pairs(labels: ArrayLike) -> np.ndarray:
    """Pairs [P, 2] for `learn_pair_whitening`: each of the labels [N] with the next of its equals.

    >>> matching_pairs(["a", "b", "a", "c", "b", "a"])
    array([[0, 2],
           [2, 5],
           [5, 0],
           [1, 4],
           [4, 1]])
    """
    _, code, count = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    order, last = np.argsort(code, kind="stable"), np.cumsum(count) - 1
    following = np.roll(order, -1)
    following[last] = order[last - count + 1]
    return np.stack([order, following], 1)[order != following]


def whiten(embeddings: ArrayLike, mean: np.ndarray, projection: np.ndarray) -> np.ndarray:
    """Applies what was learned: [N, D] → [N, dim] float32, L2-normalized before and after.

    >>> whiten([[3.0, 4.0]], np.array([0.6, 0.0]), np.array([[1.0], [0.5]]))
    array([[1.]], dtype=float32)
    """
    x = _unit("embeddings", embeddings)
    if x.shape[1] != len(mean) or x.shape[1] != len(projection):
        raise ValueError(
            f"whitening was learned for {len(mean)} dimensions, the embeddings have {x.shape[1]}"
        )
    # A product of few rows wakes threads that wait for longer than it takes.
    few = len(x) < 16
    x = x - mean
    return np.asarray(normalize(np.einsum("nd,dk->nk", x, projection) if few else x @ projection))


def expand_queries(
    query: ArrayLike,
    gallery: ArrayLike,
    k: int = 3,
    alpha: float = 3.0,
    *,
    exclude: ArrayLike | None = None,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """α-query expansion (Radenović et al., https://arxiv.org/abs/1711.02512, section 3.3).

    Every query [Q, D] becomes the normalized sum, float32, of itself, with weight 1, and its k
    nearest gallery items, with weight cosine^α (0 for negative cosines). With α = 0 these are plain
    averages; the larger it is, the more the nearest count. ValueError if it is negative.

    >>> expand_queries([[1, 0]], [[0, 1], [1, 1]], k=1, alpha=0).round(3)
    array([[0.924, 0.383]], dtype=float32)
    """
    if alpha < 0:
        raise ValueError(f"alpha must not be negative, got {alpha}")
    query, gallery = _unit("query", query), _unit("gallery", gallery)
    similarity, index = top_k(query, gallery, k, exclude=exclude, mesh=mesh)
    weight = np.where(similarity > 0, np.maximum(similarity, 0) ** alpha, 0)
    expanded = query.copy()
    for neighbour in range(k):  # one [Q, D] array at a time
        expanded += weight[:, neighbour, None] * gallery[index[:, neighbour]]
    return np.asarray(normalize(expanded))


def augment_database(
    gallery: ArrayLike, k: int = 3, alpha: float = 3.0, *, mesh: Mesh | None = None
) -> np.ndarray:
    """Database-side augmentation (Arandjelović and Zisserman, CVPR 2012).

    α-query expansion of every gallery item by the others: [G, D] → [G, D] float32.

    >>> augment_database([[1, 0], [1, 1]], k=1, alpha=0).round(3)
    array([[0.924, 0.383],
           [0.924, 0.383]], dtype=float32)
    """
    gallery = check_matrix("gallery", gallery)
    return expand_queries(gallery, gallery, k, alpha, exclude=np.arange(len(gallery)), mesh=mesh)


def k_reciprocal(
    query: ArrayLike,
    gallery: ArrayLike | None = None,
    k: int = 100,
    *,
    k1: int = 20,
    k2: int = 6,
    original: float = 0.3,
    exclude: ArrayLike | None = None,
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """k-reciprocal re-ranking (Zhong et al., https://arxiv.org/abs/1701.08398).

    Two items are alike if their reciprocal neighbourhoods are: the distance of a query and a
    gallery item is the Jaccard distance of their encoded neighbourhoods, plus a share of their
    original distance 1 - cosine. All neighbourhoods are sparse, and only the k nearest gallery
    items of each query are re-ordered, so that memory grows with (Q + G) × k1 × k2 and not with the
    square. It lets queries see each other.

    Args:
      query: [Q, D].
      gallery: [G, D]; None for the queries themselves, each without itself and `exclude`.
      k: gallery items to re-order per query.
      k1: neighbours that may be reciprocal.
      k2: neighbours whose encodings are averaged, the item itself the first of them.
      original: share λ in [0, 1] of the original distance.

    Returns:
      (distance [Q, k] float32, index [Q, k] int32), nearest first, as
      `metrics.recall_of_ranking` reads it; at equal distances the original order.

    >>> x = [[1, 0], [1, 0.1], [0, 1], [0.1, 1]]
    >>> distance, index = k_reciprocal(x, k=2, k1=1, k2=1)
    >>> index[:, 0]
    array([1, 0, 3, 2], dtype=int32)
    """
    if not 0 <= original <= 1:
        raise ValueError(f"original must be in [0, 1], got {original}")
    if not 1 <= k2 <= k1 + 1:
        raise ValueError(f"k2 must be from 1 to k1 + 1 = {k1 + 1}, got {k2}")
    if gallery is None and exclude is not None:
        raise ValueError("exclude without a gallery: there every query excludes itself")
    items = query = _unit("query", query)
    if gallery is None:
        gallery, first, exclude = query, 0, np.arange(len(query))
    else:
        gallery, first = _unit("gallery", gallery), len(query)
        items = np.concatenate([query, gallery])
    if not 1 <= k1 < len(items):
        raise ValueError(f"k1 must be from 1 to {len(items) - 1} for these items, got {k1}")
    similarity, index = top_k(query, gallery, k, exclude=exclude, mesh=mesh)
    nearest = top_k(items, items, k1, exclude=np.arange(len(items)), mesh=mesh)[1]
    nearest = np.concatenate([np.arange(len(items))[:, None], nearest], 1)

    # Reciprocal neighbours, and those of half as many neighbours that mostly agree.
    reciprocal = _reciprocal(nearest)
    half = _reciprocal(nearest[:, : round(k1 / 2) + 1])
    agreeing = (reciprocal @ half.T).multiply(reciprocal).tocsr()
    needed = 2 / 3 * np.asarray(half.sum(1)).ravel()
    agreeing.data = (agreeing.data >= needed[agreeing.indices]).astype(np.float32)
    expanded = (reciprocal + agreeing @ half).tocsr()
    expanded.eliminate_zeros()

    # Encoded by nearness, each row summing to 1, then averaged over the nearest.
    row = np.repeat(np.arange(len(items)), np.diff(expanded.indptr))
    for at in range(0, len(row), 2**16):
        some = slice(at, at + 2**16)
        cosine = np.einsum("nd,nd->n", items[row[some]], items[expanded.indices[some]])
        expanded.data[some] = np.exp(cosine - 1)
    encoded = sparse.diags(1 / np.asarray(expanded.sum(1)).ravel()) @ expanded
    encoded = (_rows(nearest[:, :k2]) / k2 @ encoded).tocsr()

    shared = np.empty(index.shape, np.float32)
    step = max(1, 2**15 // k)
    for at in range(0, len(query), step):
        rows = np.arange(at, min(at + step, len(query)))
        pairs = encoded[np.repeat(rows, k)].minimum(encoded[first + index[rows].ravel()])
        shared[rows] = np.asarray(pairs.sum(1)).reshape(-1, k)
    # Rows sum to 1, so that the sum of the maxima is 2 minus the sum of the minima.
    distance = (1 - original) * (1 - shared / (2 - shared)) + original * (1 - similarity)
    order = np.argsort(distance, 1, kind="stable")
    return np.take_along_axis(distance, order, 1), np.take_along_axis(index, order, 1)


def _rows(columns):
    """Sparse [N, N] float32 with ones at columns [N, k] of every row."""
    size, k = columns.shape
    ones = np.ones(columns.size, np.float32)
    return sparse.csr_array((ones, columns.ravel(), np.arange(0, size * k + 1, k)), (size, size))


def _reciprocal(nearest):
    neighbours = _rows(nearest)
    return neighbours.multiply(neighbours.T).tocsr()


def _unit(name: str, x: ArrayLike) -> np.ndarray:
    """[N, D] in float32, L2-normalized, on the host."""
    return np.array(normalize(check_rows(name, check_matrix(name, x))))
