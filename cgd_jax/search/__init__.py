"""Search one's own images: an index of a folder, and what is found in it.

index = search.Index.open("runs/index")
hits = index.search("query.jpg", k=5)
"""

from cgd_jax.runtime import packages

packages.require("cgd_jax.search", "search", "PIL", "cv2", "simplejpeg", "pyarrow", "tqdm")

from cgd_jax.search.index import Index, IndexInfo  # noqa: E402
from cgd_jax.search.stores import Hit, Record, StoreError  # noqa: E402

__all__ = ["Hit", "Index", "IndexInfo", "Record", "StoreError"]
