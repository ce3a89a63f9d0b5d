"""Poolings against NumPy written another way, finite differences, and the corners."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgd_jax import pooling

SHAPES = [(2, 4, 4, 3), (5, 7, 2), (2, 3, 1, 1, 4), (1, 14, 14, 8)]


def features_of(shape, seed=0, scale=1.0):
    """Feature maps as they come out of a ReLU: half of them zero."""
    values = np.random.default_rng(seed).normal(size=shape) * scale
    return np.maximum(values, 0).astype(np.float32)


def numpy_gem(features, p, eps=1e-6):
    """Position by position, in float64."""
    *leading, height, width, channels = features.shape
    total = np.zeros((*leading, channels))
    for i in range(height):
        for j in range(width):
            total += np.clip(features[..., i, j, :].astype(np.float64), eps, None) ** p
    return (total / (height * width)) ** (1 / p)


def numpy_rmac(features, levels):
    """Tolias et al., section 3.2, for square maps, one region after the other."""
    side = features.shape[-2]
    total = np.zeros((*features.shape[:-3], features.shape[-1]))
    for level in range(1, levels + 1):
        region = max(1, 2 * side // (level + 1))
        starts = [int(s) for s in np.linspace(0, side - region, level)]
        if level == 1:
            starts = [(side - region) // 2]
        for i in starts:
            for j in starts:
                m = features[..., i : i + region, j : j + region, :].astype(np.float64)
                m = m.max(axis=-2).max(axis=-2)
                total += m / np.sqrt((m * m).sum(-1, keepdims=True) + 1e-30)
    return total


@pytest.mark.parametrize("shape", SHAPES)
def test_spoc_and_mac_against_numpy(shape):
    features = features_of(shape)
    flat = features.reshape(*shape[:-3], -1, shape[-1]).astype(np.float64)
    np.testing.assert_allclose(
        pooling.spoc(jnp.asarray(features)), np.einsum("...pc->...c", flat) / flat.shape[-2], 1e-6
    )
    np.testing.assert_array_equal(pooling.mac(jnp.asarray(features)), np.sort(flat, -2)[..., -1, :])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [1.0, 2.5, 3.0, 10.0, -1.0])
def test_gem_against_numpy(shape, p):
    features = features_of(shape) + 0.01
    np.testing.assert_allclose(
        pooling.gem(jnp.asarray(features), p), numpy_gem(features, p), rtol=1e-5
    )


def test_gem_floors_zeros_at_eps():
    features = features_of((2, 4, 4, 3))
    np.testing.assert_allclose(
        pooling.gem(jnp.asarray(features)), numpy_gem(features, 3.0), rtol=1e-5
    )
    np.testing.assert_allclose(pooling.gem(jnp.zeros((4, 4, 2)), eps=1e-3), [1e-3, 1e-3], 1e-5)


def test_gem_with_one_exponent_a_channel():
    features = features_of((2, 4, 4, 3)) + 0.1
    p = np.array([1.0, 3.0, 5.0], np.float32)
    expected = np.stack([numpy_gem(features[..., c : c + 1], p[c])[..., 0] for c in range(3)], -1)
    np.testing.assert_allclose(pooling.gem(jnp.asarray(features), jnp.asarray(p)), expected, 1e-5)


def test_gem_is_spoc_at_1_and_nears_mac():
    features = jnp.asarray(features_of((2, 5, 5, 4)) + 0.01)
    np.testing.assert_allclose(pooling.gem(features, 1.0), pooling.spoc(features), rtol=1e-5)
    np.testing.assert_allclose(pooling.gem(features, 1000.0), pooling.mac(features), rtol=5e-3)


@pytest.mark.parametrize("side,levels", [(14, 3), (7, 3), (7, 1), (4, 4), (1, 3), (2, 3)])
def test_rmac_against_numpy(side, levels):
    features = features_of((2, side, side, 5)) + 0.01
    np.testing.assert_allclose(
        pooling.rmac(jnp.asarray(features), levels), numpy_rmac(features, levels), rtol=1e-5
    )


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 4))
def test_rmac_regions_lie_inside_and_see_both_ends(height, width, levels):
    regions = pooling.rmac_regions(height, width, levels)
    for top, left, side in regions:
        assert 0 <= top <= height - side and 0 <= left <= width - side and side >= 1
    if levels >= 2:
        assert min(t for t, _, _ in regions) == 0 == min(l for _, l, _ in regions)
        assert max(t + s for t, _, s in regions) == height
        assert max(l + s for _, l, s in regions) == width


def test_rmac_regions_of_an_oblong_map_overlap_by_about_40_per_cent():
    first_level = [region for region in pooling.rmac_regions(10, 16, 1)]
    assert first_level == [(0, 0, 10), (0, 6, 10)]
    assert [(l, t, s) for t, l, s in pooling.rmac_regions(16, 10, 1)] == first_level


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from("SMGR"), st.permutations(range(9)))
def test_poolings_ignore_order_and_scale_with_the_features(seed, letter, order):
    features = features_of((3, 3, 4), seed) + 0.01
    pool = jax.jit(pooling.POOLINGS[letter])
    pooled = pool(jnp.asarray(features))
    if letter != "R":  # regions have a place
        shuffled = features.reshape(9, 4)[list(order)].reshape(3, 3, 4)
        np.testing.assert_allclose(pool(jnp.asarray(shuffled)), pooled, rtol=2e-5)
        np.testing.assert_allclose(pool(jnp.asarray(8 * features)), 8 * pooled, rtol=2e-5)
        assert np.all(pooled <= features.max((0, 1)) * 1.00001)
    else:  # its regions are normalized
        np.testing.assert_allclose(pool(jnp.asarray(8 * features)), pooled, rtol=2e-5)


@pytest.mark.parametrize("letter", pooling.POOLINGS)
def test_gradients_against_finite_differences(letter):
    features = jnp.asarray(features_of((3, 3, 2), seed=3) + 0.1 * np.arange(18).reshape(3, 3, 2))
    weights = jnp.array([0.7, -1.3])

    def value(x):
        return jnp.sum(weights * pooling.POOLINGS[letter](x))

    steps = 1e-2 * np.eye(18, dtype=np.float32).reshape(18, 3, 3, 2)
    values = jax.jit(jax.vmap(value))
    numeric = (values(features + steps) - values(features - steps)) / 2e-2
    np.testing.assert_allclose(jax.jit(jax.grad(value))(features).ravel(), numeric, atol=3e-3)


def test_gradient_of_learned_p_against_finite_differences():
    features = jnp.asarray(features_of((4, 4, 3)) + 0.1)
    for p in (jnp.float32(3.0), jnp.array([2.0, 3.0, 4.0])):
        value = jax.jit(lambda p: pooling.gem(features, p).sum())
        gradient = jax.jit(jax.grad(value))(p)
        for index in np.ndindex(p.shape):
            step = np.zeros_like(p)
            step[index] = 1e-2
            numeric = (value(p + step) - value(p - step)) / 2e-2
            np.testing.assert_allclose(gradient[index], numeric, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("letter", pooling.POOLINGS)
def test_half_precision_keeps_its_dtype_and_stays_close(letter, dtype):
    features = jnp.asarray(features_of((2, 14, 14, 4)) + 0.01)
    pooled = pooling.POOLINGS[letter](features.astype(dtype))
    assert pooled.dtype == dtype
    np.testing.assert_allclose(
        pooled.astype(jnp.float32), pooling.POOLINGS[letter](features), rtol=2e-2
    )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("letter", pooling.POOLINGS)
def test_values_and_gradients_are_finite_at_the_corners(letter, dtype):
    total = lambda x: pooling.POOLINGS[letter](x).astype(jnp.float32).sum()
    value_and_grad = jax.jit(jax.value_and_grad(total))
    for value in (0.0, 1e-7, 6e4):  # 60,000 cubed overflows float16, 1e-7 cubed underflows it
        pooled, gradient = value_and_grad(jnp.full((3, 3, 2), value, dtype))
        assert np.isfinite(pooled) and np.all(np.isfinite(gradient.astype(jnp.float32))), value


def test_gem_in_half_precision_has_the_gradient_of_float32_beside_zeros():
    features = jnp.asarray(features_of((4, 4, 3)))
    gradient = jax.jit(jax.grad(lambda x: pooling.gem(x).astype(jnp.float32).sum()))
    exact, half = gradient(features), gradient(features.astype(jnp.float16))
    assert np.abs(exact).max() > 0.1
    np.testing.assert_allclose(half.astype(jnp.float32), exact, rtol=2e-2, atol=1e-3)


def test_gem_does_not_overflow_with_a_large_learned_p():
    features = jnp.full((2, 2, 1), 1e6)
    np.testing.assert_allclose(pooling.gem(features, jnp.float32(50.0)), [1e6], rtol=1e-4)


def test_under_jit_and_vmap():
    features = jnp.asarray(features_of((3, 4, 4, 2)) + 0.1)
    for pool in pooling.POOLINGS.values():
        np.testing.assert_allclose(jax.jit(pool)(features), pool(features), rtol=1e-6)
        np.testing.assert_allclose(jax.vmap(pool)(features), pool(features), rtol=1e-6)


@pytest.mark.parametrize("pool", pooling.POOLINGS.values())
def test_bad_input(pool):
    with pytest.raises(ValueError, match=r"\(4, 2\)"):
        pool(jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="H, W, C > 0"):
        pool(jnp.ones((2, 0, 4, 3)))
    with pytest.raises(ValueError, match="int32"):
        pool(jnp.ones((4, 4, 2), jnp.int32))


def test_bad_arguments():
    features = jnp.ones((4, 4, 3))
    with pytest.raises(ValueError, match=r"\(2,\)"):
        pooling.gem(features, jnp.ones(2))
    with pytest.raises(ValueError, match="p = 0"):
        pooling.gem(features, 0)
    with pytest.raises(ValueError, match="eps"):
        pooling.gem(features, eps=0.0)
    with pytest.raises(ValueError, match="levels"):
        pooling.rmac(features, 0)
