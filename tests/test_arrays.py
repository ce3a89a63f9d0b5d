"""Lists and tensors of PyTorch mean what the NumPy arrays of the same values mean."""

import jax
import numpy as np
import pytest

from cgd_jax import combination, geometry, losses, metrics, pooling, rerank, retrieval
from tests import quick

RNG = np.random.default_rng(0)
FEATURES = RNG.random((8, 3, 4, 6), np.float32)
X = RNG.normal(size=(8, 6)).astype(np.float32)
X /= np.linalg.norm(X, axis=1, keepdims=True)
LABELS = np.repeat(np.arange(4), 2)
CENTERS = RNG.normal(size=(4, 1, 6)).astype(np.float32)

FUNCTIONS = {f"pool {letter}": (pool, FEATURES) for letter, pool in pooling.POOLINGS.items()}
FUNCTIONS |= {name: (loss, X, LABELS) for name, loss in losses.RANKING_LOSSES.items()}
FUNCTIONS |= {
    name: (loss, X, LABELS, CENTERS)
    for name, loss in {**losses.PROXY_LOSSES, **losses.CENTER_LOSSES}.items()
}
FUNCTIONS |= {
    "smoothed_cross_entropy": (losses.smoothed_cross_entropy, X, LABELS),
    "pairwise_distances": (losses.pairwise_distances, X),
    "similarities": (losses.similarities, X),
    "class_similarities": (losses.class_similarities, X, CENTERS),
    "push": (lambda *batch: losses.push(losses.empty_memory(9, 6), *batch), X, LABELS),
    "l2_normalize": (combination.l2_normalize, X),
    "combine": (lambda d, k: combination.combine([d, d], [k, k]), X, CENTERS[0].T),
    "recall_at_k": (metrics.recall_at_k, X, LABELS),
    "evaluate": (lambda *of: metrics.evaluate(*of, ks=(1, 2)), X, LABELS, X[::-1], LABELS),
    "top_k": (lambda x: retrieval.top_k(x, x, 2), X),
    "expand_queries": (lambda x: rerank.expand_queries(x, x, 2), X),
    "k_reciprocal": (lambda x: rerank.k_reciprocal(x, k=2, k1=3, k2=2), X),
    "learn_whitening": (lambda x: rerank.learn_whitening(x, 3), X),
    "learn_pair_whitening": (lambda x: rerank.learn_pair_whitening(x, [[0, 1], [2, 3]], 3), X),
    "describe_batch": (geometry.describe_batch, X, LABELS),
    "describe_set": (geometry.describe_set, X, LABELS),
}


class Tensor:
    """As torch.Tensor: it has a shape and a dtype, which is none of NumPy's, and is no array."""

    def __init__(self, array):
        self.array = np.ascontiguousarray(array)
        self.shape, self.ndim, self.dtype = self.array.shape, self.array.ndim, object()

    def __array__(self, dtype=None, copy=None):
        return self.array.astype(dtype) if dtype else self.array

    def __len__(self):
        return len(self.array)

    def __getitem__(self, at):
        return Tensor(self.array[at])


def tensor_of_pytorch(array):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    return torch.from_numpy(np.ascontiguousarray(array))


LOSSES = {**losses.RANKING_LOSSES, **losses.PROXY_LOSSES, **losses.CENTER_LOSSES}  # all alike
NAMES = quick.first(sorted(FUNCTIONS, key=LOSSES.__contains__), len(FUNCTIONS) - len(LOSSES) + 1)


@pytest.mark.parametrize("kind", quick.first([np.ndarray.tolist, Tensor, tensor_of_pytorch], 2))
@pytest.mark.parametrize("name", NAMES)
def test_lists_and_tensors_are_arrays(name, kind):
    function, *arrays = FUNCTIONS[name]
    expected, found = function(*arrays), function(*map(kind, arrays))
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(same, expected, found)


def test_ids_of_64_bits_stay_apart():
    assert losses.batch_hard_triplet_loss(X, LABELS * 2**40) == pytest.approx(
        losses.batch_hard_triplet_loss(X, LABELS)
    )
