"""Where embeddings lie on the sphere: whether they spread, or have collapsed to one point.

Recall looks at the order of distances only and stays high while all of them go to zero; these
numbers do not.

>>> found = describe_batch(jnp.eye(4), jnp.array([0, 0, 1, 1]), margin=0.1)
>>> for name, value in found.items():
...     print(f"{name} {value:.2f}")
active_triplets 1.00
positive_distance 1.41
negative_distance 1.41
hardest_positive 1.41
hardest_negative 1.41
mean_embedding_norm 0.50
"""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from cgd_jax.labels import as_labels
from cgd_jax.losses import pairwise_distances
from cgd_jax.losses.miners import hardest
from cgd_jax.retrieval import check_matrix, check_rows, normalize

__all__ = ["cluster_agreement", "describe_batch", "describe_set"]

QUERIES = 256  # of a test set, whose farthest positive and nearest negative are looked for


def describe_batch(
    embeddings: jax.Array, labels: jax.Array, margin: float = 0.0
) -> dict[str, jax.Array]:
    """Measures a training batch: embeddings [B, D], unit vectors, and labels [B], integers.

    Returns:
      Float32 scalars, nan where the batch has no such pair.
      active_triplets: share of anchors whose hardest triplet is ordered by less than the margin.
      positive_distance, negative_distance: mean distance of two images of one class, of two.
      hardest_positive, hardest_negative: mean over the anchors of the distance to the farthest
      image of their class, to the nearest of another.
      mean_embedding_norm: length of the mean vector, 1 if all lie in one point.
    """
    embeddings, labels = jnp.asarray(embeddings), jnp.asarray(labels)
    distances = pairwise_distances(embeddings)
    same = labels[:, None] == labels
    positive, negative = same & ~jnp.eye(len(labels), dtype=bool), ~same
    farthest, nearest = hardest(distances, positive, negative)
    anchors = positive.any(1) & negative.any(1)
    return {
        "active_triplets": jnp.mean(farthest - nearest + margin > 0, where=anchors),
        "positive_distance": jnp.mean(distances, where=positive),
        "negative_distance": jnp.mean(distances, where=negative),
        "hardest_positive": jnp.mean(farthest, where=anchors),
        "hardest_negative": jnp.mean(nearest, where=anchors),
        "mean_embedding_norm": jnp.linalg.norm(embeddings.astype(jnp.float32).mean(0)),
    }


def describe_set(embeddings: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Measures the embeddings of a whole test set.

    Embeddings [N, D], N > 0, may have any length; labels are [N]. Returns what `describe_batch`
    does but active_triplets. Of the distances of pairs it is the root mean square; the hardest are
    means over 256 queries drawn at random.
    """
    unit = np.array(embeddings, np.float32)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-6)
    mean = unit.mean(0, dtype=np.float64)
    # Within a collapsed embedding all cosines are 1 but for rounding; seen from the mean
    # they are not.
    unit -= mean.astype(np.float32)
    _, code, count = np.unique(labels, return_inverse=True, return_counts=True)
    squared = np.einsum("nd,nd->n", unit, unit, dtype=np.float64)
    sums, squares = np.zeros((len(count), unit.shape[1])), np.bincount(code, squared)
    np.add.at(sums, code, unit)
    # Σ |x - y|² over ordered pairs = 2 n Σ |x|² - 2 |Σ x|², within every class and over all.
    within = np.sum(2 * count * squares) - 2 * np.sum(sums**2)
    total = 2 * len(unit) * squared.sum() - 2 * np.sum(sums.sum(0) ** 2)
    pairs_within = np.sum(count * (count - 1.0))
    pairs_across = len(unit) * (len(unit) - 1.0) - pairs_within

    farthest, nearest = [], []
    queries = np.random.default_rng(0).permutation(len(unit))[:QUERIES]
    for block in np.array_split(queries, -(-len(queries) // 32)):
        distances = squared[block, None] + squared - 2.0 * (unit[block] @ unit.T)
        same = code[block, None] == code
        nearest.append(np.where(same, np.inf, distances).min(1))
        same[np.arange(len(block)), block] = False
        farthest.append(np.where(same, distances, -np.inf).max(1))

    def mean_root(squares: np.ndarray) -> float:
        known = squares[np.isfinite(squares)]
        return float(np.sqrt(np.maximum(0.0, known)).mean()) if known.size else float("nan")

    return {
        "positive_distance": mean_root(np.array([within / (pairs_within or np.nan)])),
        "negative_distance": mean_root(np.array([(total - within) / (pairs_across or np.nan)])),
        "hardest_positive": mean_root(np.concatenate(farthest)),
        "hardest_negative": mean_root(np.concatenate(nearest)),
        "mean_embedding_norm": float(np.linalg.norm(mean)),
    }


def cluster_agreement(embeddings: ArrayLike, labels: ArrayLike, seed: int = 0) -> dict[str, float]:
    """Agreement of k-means clusters, as many as classes, with the labels [N] of embeddings [N, D].

    Returns {"nmi": …, "ami": …}, normalized (arithmetic mean) and adjusted mutual information; both
    1 for identical partitions. Takes hours for ten thousand classes: k-means computes all distances
    to all centers many times over. Raises ImportError without scikit-learn.

    >>> cluster_agreement([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], ["a", "a", "b", "b"])
    {'nmi': 1.0, 'ami': 1.0}
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
    except ImportError as error:
        raise ImportError("NMI and AMI need scikit-learn: pip install scikit-learn") from error
    vectors, labels = check_matrix("embeddings", embeddings), as_labels("labels", labels)
    if labels.shape != (len(vectors),):
        found = f"embeddings {vectors.shape}, labels {labels.shape}"
        raise ValueError(f"labels must be one per row: {found}")
    means = KMeans(len(np.unique(labels)), n_init=1, random_state=seed)
    found = means.fit_predict(np.asarray(normalize(check_rows("embeddings", vectors))))
    scores = {"nmi": normalized_mutual_info_score, "ami": adjusted_mutual_info_score}
    return {name: float(score(labels, found)) for name, score in scores.items()}
