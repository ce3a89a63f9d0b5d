"""Search one's own pictures: an index of a folder, and what is found in it.

index = search.Index.open("runs/index")
hits = index.search("query.jpg", k=5)
"""

from cgd_jax.search.index import Index, IndexInfo, Record
from cgd_jax.search.stores import Hit, StoreError

__all__ = ["Hit", "Index", "IndexInfo", "Record", "StoreError"]
