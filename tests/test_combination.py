"""The combinations against NumPy, and what must hold of every embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgd_jax.combination import COMBINATIONS, combine, kernel_shapes, l2_normalize


def example(n, combination, dim=12, batch=5, channels=7, seed=0):
    rng = np.random.default_rng(seed)
    descriptors = [rng.normal(size=(batch, channels)).astype(np.float32) for _ in range(n)]
    shapes = kernel_shapes(channels, n, dim, combination)
    return descriptors, [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def unit(rows):
    """Row by row."""
    return np.stack([row / np.sqrt(np.dot(row, row)) for row in rows.astype(np.float64)])


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_against_numpy(n):
    for combination in COMBINATIONS:
        descriptors, kernels = example(n, combination)
        embedding, ranked = combine(descriptors, kernels, combination)
        if combination == "raw":
            expected = unit(np.hstack(descriptors) @ kernels[0])
        else:
            branches = [unit(d @ k) for d, k in zip(descriptors, kernels, strict=True)]
            expected = unit(sum(branches) if combination == "sum" else np.hstack(branches))
        assert embedding.shape == (5, 12) and embedding.dtype == jnp.float32
        np.testing.assert_allclose(embedding, expected, atol=1e-6)
        if combination == "separate":
            for vectors, branch in zip(ranked, branches, strict=True):
                np.testing.assert_allclose(vectors, branch, atol=1e-6)
        else:
            assert len(ranked) == 1
            np.testing.assert_array_equal(ranked[0], embedding)


def test_every_branch_has_an_equal_share_in_the_similarity():
    descriptors, kernels = example(3, "concat")
    descriptors[1] *= 1000  # cancelled by the branch's own normalization
    embedding, _ = combine(descriptors, kernels)
    norms = np.linalg.norm(np.asarray(embedding).reshape(5, 3, 4), axis=-1)
    np.testing.assert_allclose(norms, 1 / np.sqrt(3), atol=1e-6)
    raw = combine(*example(3, "raw"), "raw")[0]
    loud = example(3, "raw")
    loud[0][1] *= 1000  # not cancelled: this is what rival B lacks
    assert np.abs(np.asarray(combine(*loud, "raw")[0]) - raw).max() > 0.01


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.sampled_from(COMBINATIONS), st.sampled_from(["f2", "f4"]))
def test_embeddings_have_unit_length(seed, combination, dtype):
    descriptors, kernels = example(2, combination, seed=seed)
    embedding, ranked = combine(
        [d.astype(dtype) for d in descriptors], [k.astype(dtype) for k in kernels], combination
    )
    for vectors in [embedding, *ranked]:
        assert vectors.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_l2_normalize_in_half_precision_and_along_another_axis():
    big = jnp.full((1, 4), 300.0, jnp.float16)  # 4 · 300² overflows float16
    np.testing.assert_allclose(l2_normalize(big), np.full((1, 4), 0.5), atol=1e-3)
    assert l2_normalize(big).dtype == jnp.float16
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    np.testing.assert_allclose(l2_normalize(jnp.asarray(x), axis=0).T, unit(x.T), atol=1e-6)


def test_gradient_against_finite_differences():
    descriptors, kernels = example(2, "concat")
    weights = np.random.default_rng(1).normal(size=(5, 12)).astype(np.float32)

    @jax.jit
    def value(first):
        return jnp.sum(combine([first, descriptors[1]], kernels)[0] * weights)

    gradient = jax.jit(jax.grad(value))(jnp.asarray(descriptors[0]))
    for index in [(0, 0), (2, 3), (4, 6)]:
        step = np.zeros((5, 7), np.float32)
        step[index] = 1e-2
        numeric = (value(descriptors[0] + step) - value(descriptors[0] - step)) / 2e-2
        np.testing.assert_allclose(gradient[index], numeric, rtol=2e-2, atol=2e-3)


def test_bad_input():
    with pytest.raises(ValueError, match=r"'product'.*concat, sum, separate, raw"):
        kernel_shapes(8, 2, 16, "product")
    with pytest.raises(ValueError, match=r"'product'.*concat, sum, separate, raw"):
        combine([jnp.ones((1, 2))], [jnp.ones((2, 2))], "product")
    with pytest.raises(ValueError, match="9 or 12 can"):
        kernel_shapes(8, 3, 10, "concat")
    with pytest.raises(ValueError, match=r"\(5, 7\).*\(6, 6\)"):
        combine([jnp.ones((5, 7))], [jnp.ones((6, 6))])
    with pytest.raises(ValueError, match="kernel_shapes"):
        combine([jnp.ones((5, 7))] * 2, [jnp.ones((7, 6))])
