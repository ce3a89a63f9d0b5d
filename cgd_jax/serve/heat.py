"""Where in two pictures the network finds what they have in common; see `cgd_jax.attribution`."""

from typing import TYPE_CHECKING

import numpy as np

from cgd_jax import attribution, pooling
from cgd_jax.search import Index, stores

if TYPE_CHECKING:
    from cgd_jax.models.cgd import CGD

__all__ = ["Heat"]

SAMPLE = 100_000  # pictures whose mean vector stands for the average picture


class Heat:
    """Explains the similarities of an index's pictures.

    Attributes:
      possible: whether the index's vectors can be taken apart. They cannot where they were
        whitened, or are not what `attribution.explain_pair` takes apart.
      inset: the side of the square that the network sees, as a part of the whole picture's.
    """

    def __init__(self, index: Index):
        self._index = index
        info = index.info
        network = index.network
        self.inset = info.image_size / info.resize
        self._explained: tuple[CGD, dict] | None = None
        if network.model is not None and info.whitened_from is None:
            self._explained = _embedding_network(network.model, network.variables, info.vector)
        self.possible = self._explained is not None
        self._reference: np.ndarray | None = None

    def maps(self, pixels: np.ndarray) -> np.ndarray:
        """Returns [2, H, W] float32: what the regions of two images add to their similarity.

        Args:
          pixels: [2, resize, resize, 3] uint8.
        """
        assert self._explained is not None
        if self._reference is None:
            self._reference = self._mean_vector()
        found = attribution.explain_pair(
            *self._explained,
            self._index.network.normalization,
            pixels,
            self._index.info.image_size,
            self._reference,
        )
        return np.asarray(found.maps.sum(1))

    def _mean_vector(self) -> np.ndarray:
        total, count = np.zeros(self._index.info.dimension), 0
        for batch in self._index.store.read(["vector"]):
            vectors = stores.vectors_in(batch)
            total += vectors.sum(0)
            count += len(vectors)
            if count >= SAMPLE:
                break
        return (total / max(count, 1)).astype(np.float32)


def _embedding_network(model: "CGD", variables: dict, vector: str) -> tuple["CGD", dict] | None:
    """Returns a network whose embedding is the vector, or None.

    A descriptor that is searched as it comes out of the pooling is the embedding of the same
    network with an identity for its FC layer, and nothing taken from it before.
    """
    if pooling.CLASS_TOKEN in model.descriptors:
        return None
    if vector == "embedding":
        return model, variables
    if vector == f"descriptor_{model.descriptors}" and model.combination == "concat":
        name = f"fc_{model.descriptors}"
        channels = variables["params"][name].shape[0]
        params = variables["params"] | {name: np.eye(channels, dtype=np.float32)}
        return model.clone(embedding_dim=channels, center="none"), variables | {"params": params}
    return None
