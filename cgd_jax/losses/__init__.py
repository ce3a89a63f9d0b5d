"""Losses on embeddings and logits, by group.

`ranking`: of pairs, triplets and orders of a batch; `miners` choose among its pairs; `pairs` has
distances and the cross-batch memory. `proxies` and `classification`: with a learned vector a
class. The tables hold them under the names that configs use.

>>> embeddings, labels = jnp.eye(4), jnp.array([0, 0, 1, 1])  # all equally far apart
>>> for name, loss in RANKING_LOSSES.items():
...     print(f"{name} {loss(embeddings, labels):.2f}")
batch_hard_triplet 0.10
batch_all_triplet 0.10
semi_hard_triplet 0.10
soft_margin_triplet 0.69
contrastive 2.00
multi_similarity 0.66
info_nce 1.10
sup_con 1.10
circle 224.69
lifted_structure 2.85
n_pair 0.69
smooth_ap 0.50
recall_at_k 0.27
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp  # noqa: F401  (of the example above)

from cgd_jax.losses.classification import (
    arcface_loss,
    class_similarities,
    cosface_loss,
    normalized_softmax_loss,
    smoothed_cross_entropy,
)
from cgd_jax.losses.miners import MINERS
from cgd_jax.losses.pairs import Memory, empty_memory, pairwise_distances, push, similarities
from cgd_jax.losses.proxies import (
    create_proxies,
    proxy_anchor_loss,
    proxy_nca_loss,
    soft_triple_loss,
)
from cgd_jax.losses.ranking import (
    batch_all_triplet_loss,
    batch_hard_triplet_loss,
    circle_loss,
    contrastive_loss,
    info_nce_loss,
    lifted_structure_loss,
    multi_similarity_loss,
    n_pair_loss,
    recall_at_k_loss,
    semi_hard_triplet_loss,
    smooth_ap_loss,
    soft_margin_triplet_loss,
    supervised_contrastive_loss,
)

__all__ = [
    "CENTER_LOSSES",
    "LIST_LOSSES",
    "MINERS",
    "PAIR_LOSSES",
    "PROXY_LOSSES",
    "RANKING_LOSSES",
    "Memory",
    "arcface_loss",
    "batch_all_triplet_loss",
    "batch_hard_triplet_loss",
    "circle_loss",
    "class_similarities",
    "contrastive_loss",
    "cosface_loss",
    "create_proxies",
    "empty_memory",
    "info_nce_loss",
    "lifted_structure_loss",
    "multi_similarity_loss",
    "n_pair_loss",
    "normalized_softmax_loss",
    "pairwise_distances",
    "proxy_anchor_loss",
    "proxy_nca_loss",
    "push",
    "recall_at_k_loss",
    "semi_hard_triplet_loss",
    "similarities",
    "smooth_ap_loss",
    "smoothed_cross_entropy",
    "soft_margin_triplet_loss",
    "soft_triple_loss",
    "supervised_contrastive_loss",
]

Loss = Callable[..., jax.Array]

# Of pairs and triplets: they take a miner and a memory.
PAIR_LOSSES: dict[str, Loss] = {
    "batch_hard_triplet": batch_hard_triplet_loss,
    "batch_all_triplet": batch_all_triplet_loss,
    "semi_hard_triplet": semi_hard_triplet_loss,
    "soft_margin_triplet": soft_margin_triplet_loss,
    "contrastive": contrastive_loss,
    "multi_similarity": multi_similarity_loss,
    "info_nce": info_nce_loss,
    "sup_con": supervised_contrastive_loss,
    "circle": circle_loss,
    "lifted_structure": lifted_structure_loss,
}
# Of the batch as a whole.
LIST_LOSSES: dict[str, Loss] = {
    "n_pair": n_pair_loss,
    "smooth_ap": smooth_ap_loss,
    "recall_at_k": recall_at_k_loss,
}
# Both take embeddings and labels only.
RANKING_LOSSES: dict[str, Loss] = PAIR_LOSSES | LIST_LOSSES
# They take proxies [M, K, D] as well.
PROXY_LOSSES: dict[str, Loss] = {
    "proxy_nca": proxy_nca_loss,
    "proxy_anchor": proxy_anchor_loss,
    "soft_triple": soft_triple_loss,
}
# Classification by the embedding; they take centers [M, S, D].
CENTER_LOSSES: dict[str, Loss] = {
    "normalized_softmax": normalized_softmax_loss,
    "cosface": cosface_loss,
    "arcface": arcface_loss,
}
