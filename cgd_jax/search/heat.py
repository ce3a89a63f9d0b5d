"""Where in two images the network finds what they have in common; see `cgd_jax.attribution`."""

from functools import cached_property

import numpy as np

from cgd_jax import attribution
from cgd_jax.search import Index, stores

SAMPLE = 100_000  # images whose mean vector stands for the average image


class Heat:
    """Explains the similarities of an index's images, if `possible`.

    `inset` is the side of the square that the network sees, as a part of the whole image's.
    """

    def __init__(self, index: Index):
        self._index, info, model = index, index.info, index.network.model
        self.inset = info.image_size / info.resize
        self.possible = (
            model is not None
            and info.whitened_from is None
            and not info.shapes
            and info.scales == [1.0]
            and not attribution.why_no_map(model.descriptors, info.vector)
        )

    def maps(self, pixels: np.ndarray) -> np.ndarray:
        """Returns what the regions of two images add to their similarity, [2, H, W] float32."""
        found = self._index.network.explain(pixels[0], pixels[1], self._average)
        return np.asarray(found.maps.sum(1))

    @cached_property
    def _average(self) -> np.ndarray:
        total, count = np.zeros(self._index.info.dimension), 0
        for batch in self._index.store.read(["vector"]):
            vectors = stores.vectors_in(batch)
            total += vectors.sum(0)
            count += len(vectors)
            if count >= SAMPLE:
                break
        return (total / max(count, 1)).astype(np.float32)
