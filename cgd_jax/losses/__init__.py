"""Losses on embeddings and logits, by group.

`ranking`: of pairs and triplets, among which `miners` choose; `listwise`: of the order of a
batch; `classification`: with learned vectors of classes, and of logits. Each has tables of its
losses under the names that configs use. `pairs` has distances and the cross-batch memory.
"""

# ruff: noqa: F403, F405

from collections import ChainMap
from collections.abc import Callable

from jax import Array

from cgd_jax.losses import classification, listwise, pairs, ranking
from cgd_jax.losses.classification import *
from cgd_jax.losses.listwise import *
from cgd_jax.losses.miners import MINERS
from cgd_jax.losses.pairs import *
from cgd_jax.losses.ranking import *

__all__ = ["MINERS", "RANKING_LOSSES"]
__all__ += classification.__all__ + listwise.__all__ + pairs.__all__ + ranking.__all__

# All that take embeddings and labels only: a view of both tables, which sees what is added later.
RANKING_LOSSES: ChainMap[str, Callable[..., Array]] = ChainMap(LIST_LOSSES, PAIR_LOSSES)
