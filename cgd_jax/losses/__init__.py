"""Losses on embeddings and logits, by group.

`ranking`: of pairs and triplets, among which `miners` choose; `listwise`: of the order of a
batch; `pairs` has distances and the cross-batch memory. `proxies` and `classification`: with
learned vectors of classes. Each has a table of its losses under the names that configs use.

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

# ruff: noqa: F403, F405

from collections import ChainMap
from collections.abc import Callable

import jax
import jax.numpy as jnp  # noqa: F401  (of the example above)

from cgd_jax.losses import classification, listwise, pairs, proxies, ranking
from cgd_jax.losses.classification import *
from cgd_jax.losses.listwise import *
from cgd_jax.losses.miners import MINERS
from cgd_jax.losses.pairs import *
from cgd_jax.losses.proxies import *
from cgd_jax.losses.ranking import *

__all__ = ["MINERS", "RANKING_LOSSES"]
__all__ += classification.__all__ + listwise.__all__ + pairs.__all__
__all__ += proxies.__all__ + ranking.__all__

# All that take embeddings and labels only: a view of both tables, which sees what is added later.
RANKING_LOSSES: ChainMap[str, Callable[..., jax.Array]] = ChainMap(LIST_LOSSES, PAIR_LOSSES)
