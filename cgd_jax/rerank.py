"""What can be done to embeddings, or to a ranking, after the network and before the metrics.

Pure functions, applied in this order: PCA-whitening, database-side augmentation, α-query
expansion, k-reciprocal re-ranking. The first three give embeddings that `metrics` measures
like any others; the last gives, per query, a new order of its nearest gallery items.
"""

import numpy as np

from cgd_jax.metrics import normalize
from cgd_jax.retrieval import top_k


def learn_whitening(embeddings, dim=None, shrink=0.0):
    """PCA-whitening of L2-normalized embeddings (https://arxiv.org/abs/1210.1386).

    Learn it on the training set: on the test set it would look at what is measured.

    Args:
        embeddings: [N, D], any real dtype.
        dim: number of leading components that are kept, at most D and N - 1; None for all
            with a variance above round-off.
        shrink: share in [0, 1] of the mean variance in every direction's: 0 whitens fully,
            1 only rotates. Small variances are noise that whitening would amplify.

    Returns:
        (mean [D], projection [D, dim]), float32, for `whiten`.

    Raises:
        ValueError: bad shapes, values that are not finite, or ``dim`` larger than what
            these embeddings span.
    """
    x = _checked("embeddings", embeddings).astype(np.float64)
    if not 0 <= shrink <= 1:
        raise ValueError(f"shrink must be in [0, 1], got {shrink}")
    mean = x.mean(0)
    x = x - mean
    variance, axes = np.linalg.eigh(x.T @ x / max(len(x) - 1, 1))
    variance, axes = variance[::-1], axes[:, ::-1]
    spanned = int(np.sum(variance > max(variance[0], 0) * 1e-7)) if variance[0] > 1e-12 else 0
    dim = spanned if dim is None else dim
    if not 1 <= dim <= spanned:
        raise ValueError(f"dim must be from 1 to {spanned}, which these embeddings span; got {dim}")
    scale = (1 - shrink) * variance[:dim] + shrink * variance[:spanned].mean()
    return mean.astype(np.float32), (axes[:, :dim] / np.sqrt(scale)).astype(np.float32)


def whiten(embeddings, mean, projection):
    """Applies `learn_whitening`: [N, D] → [N, dim] float32, L2-normalized before and after."""
    x = _checked("embeddings", embeddings)
    if x.shape[1] != len(mean) or x.shape[1] != len(projection):
        raise ValueError(
            f"whitening was learned for {len(mean)} dimensions, the embeddings have {x.shape[1]}"
        )
    return np.asarray(normalize((x - mean) @ projection))


def expand_queries(query, gallery, k=3, alpha=3.0, *, exclude=None, mesh=None):
    """α-query expansion (Radenović et al., https://arxiv.org/abs/1711.02512, section 3.3).

    Every query becomes the normalized sum of itself, with weight 1, and its k nearest
    gallery items, with weight cosine^α (0 for negative cosines).

    Args:
        query: [Q, D]. gallery: [G, D].
        k: neighbours that are added.
        alpha: 0 for plain averages; the larger, the more the nearest count.
        exclude, mesh: as for `retrieval.top_k`.

    Returns:
        [Q, D] float32, L2-normalized.

    Raises:
        ValueError: as `retrieval.top_k`; negative alpha.
    """
    if alpha < 0:
        raise ValueError(f"alpha must not be negative, got {alpha}")
    query, gallery = _checked("query", query), _checked("gallery", gallery)
    similarity, index = top_k(query, gallery, k, exclude=exclude, mesh=mesh)
    weight = np.where(similarity > 0, np.maximum(similarity, 0) ** alpha, 0)
    expanded = query.copy()
    for neighbour in range(k):  # one [Q, D] array at a time
        expanded += weight[:, neighbour, None] * gallery[index[:, neighbour]]
    return np.asarray(normalize(expanded))


def augment_database(gallery, k=3, alpha=3.0, *, mesh=None):
    """Database-side augmentation (Arandjelović and Zisserman, CVPR 2012).

    α-query expansion of every gallery item by the others: [G, D] → [G, D] float32.
    """
    return expand_queries(
        gallery, gallery, k, alpha, exclude=np.arange(len(gallery)), mesh=mesh
    )
