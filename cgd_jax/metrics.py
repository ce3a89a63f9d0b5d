"""How high do true matches rank? Exact retrieval metrics from counts, without sorting a gallery."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

# Two float32 cosines closer than this are equal: the order of summation, which
# differs between kernels and at the edges of their tiles, moves them as much.
TIE = 1e-6
# Memory for the similarities of one block of queries to the whole gallery.
BLOCK_BYTES = 2**28


@jax.jit
def _normalize(x):
    x = x.astype(jnp.float32)
    x = x / jnp.maximum(jnp.max(jnp.abs(x), -1, keepdims=True), 1e-30)  # squares cannot overflow
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


@partial(jax.jit, static_argnames="precision")
def _best_rank(query, gallery, positives, own, precision):
    similarity = jnp.matmul(query, gallery.T, precision=precision)
    at = lambda index: jnp.where(
        index < 0, -jnp.inf, jnp.take_along_axis(similarity, jnp.maximum(index, 0), 1)
    )
    positive = at(positives)
    threshold = jnp.max(positive, 1, keepdims=True) - TIE
    count = lambda values: jnp.sum(values >= threshold, 1, dtype=jnp.int32)
    return 1 + count(similarity) - count(positive) - count(at(own))


def recall_at_k(query, query_labels, gallery=None, gallery_labels=None, ks=(1, 2, 4, 8)):
    """Share of queries with a true match among the k most similar gallery items.

    Args:
        query: embeddings ``[Q, D]``, any float dtype; L2-normalized here, in float32.
        query_labels: ``[Q]``.
        gallery: embeddings ``[G, D]``; None searches the queries themselves, where no
            query finds itself.
        gallery_labels: ``[G]``; None if and only if ``gallery`` is None.
        ks: the values of k.

    Returns:
        ``{k: recall}``, floats in [0, 1] over the queries that have a true match. An item
        of another class as similar as the best true match stands before it.

    Raises:
        ValueError: empty or non-finite embeddings, shapes that do not fit, or no query
            with a true match.
    """
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("give both gallery and gallery_labels, or neither")
    alone = gallery is None
    if alone:
        gallery, gallery_labels = query, query_labels
    for name, x, y in (("query", query, query_labels), ("gallery", gallery, gallery_labels)):
        if np.ndim(x) != 2 or np.size(x) == 0 or np.shape(y) != np.shape(x)[:1]:
            raise ValueError(
                f"{name} must be [N, D] with {name}_labels [N], N and D at least 1; "
                f"got {np.shape(x)} and {np.shape(y)}"
            )
        if not bool(jnp.isfinite(jnp.asarray(x, jnp.float32)).all()):
            raise ValueError(f"{name} holds NaN or infinite embeddings")
    if np.shape(query)[1] != np.shape(gallery)[1]:
        raise ValueError(
            f"query and gallery differ in size: {np.shape(query)} and {np.shape(gallery)}"
        )
    if any(k < 1 for k in ks):
        raise ValueError(f"every k must be at least 1, got {tuple(ks)}")

    n, size = len(query_labels), len(gallery_labels)
    _, codes = np.unique(
        np.concatenate([np.asarray(query_labels), np.asarray(gallery_labels)]), return_inverse=True
    )
    codes, gallery_codes = codes[:n], codes[n:]
    order = np.argsort(gallery_codes, kind="stable")
    start = np.searchsorted(gallery_codes[order], codes)
    count = np.searchsorted(gallery_codes[order], codes, side="right") - start

    gallery = _normalize(gallery)
    block = int(np.clip(BLOCK_BYTES // (4 * size), 1, min(n, 1024)))
    ranks = []
    for first in range(0, n, block):
        # The last block starts early so that every block has one shape.
        i = np.arange(first, first + block)
        i = np.minimum(i, n - 1)
        slot = np.arange(max(count.max(), 1))
        positives = order[np.minimum(start[i, None] + slot, size - 1)]
        positives[slot >= count[i, None]] = -1
        own = np.full((block, 1), -1)
        if alone:
            positives[positives == i[:, None]] = -1
            own = i[:, None]
        rank = _best_rank(_normalize(jnp.asarray(query)[i]), gallery, positives, own, "highest")
        ranks.append(np.asarray(rank))
    ranks = np.concatenate(ranks)[:n][count > alone]
    if not len(ranks):
        raise ValueError("no query has a true match in the gallery: check the labels")
    return {k: float(np.mean(ranks <= k)) for k in ks}
