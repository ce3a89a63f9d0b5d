"""Convolutions written otherwise than XLA's: against loops, and against XLA's own."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from cgd_jax.models.cpu_ops import (
    Conv,
    conv,
    conv_canonical,
    conv_native,
    depthwise_conv,
    depthwise_native,
    depthwise_shifted,
    max_pool,
    max_pool_native,
    max_pool_taps,
    pointwise_conv,
)
from cgd_jax.models.family import KERNEL_INIT

STEM = {"window_shape": (3, 3), "strides": (2, 2), "padding": ((1, 1), (1, 1))}


def by_loops(x, kernel, stride):
    """Depthwise convolution with TensorFlow's padding: what is odd goes to the end."""
    batch, height, width, channels = x.shape
    side = len(kernel)
    rows, columns = -(-height // stride), -(-width // stride)
    top, left = (
        max(0, (out - 1) * stride + side - n) // 2 for out, n in ((rows, height), (columns, width))
    )
    y = np.zeros((batch, rows, columns, channels))
    for i in range(rows):
        for j in range(columns):
            for di in range(side):
                for dj in range(side):
                    row, column = i * stride + di - top, j * stride + dj - left
                    if 0 <= row < height and 0 <= column < width:
                        y[:, i, j] += x[:, row, column] * kernel[di, dj, 0]
    return y


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from([3, 5]), st.sampled_from([1, 2]))
def test_depthwise_convolution_against_loops(height, width, side, stride):
    rng = np.random.default_rng(height + 10 * width)
    x = rng.normal(size=(2, height, width, 3)).astype(np.float32)
    kernel = rng.normal(size=(side, side, 1, 3)).astype(np.float32)
    expected = by_loops(x, kernel, stride)
    for way in (depthwise_conv, depthwise_native, depthwise_shifted):
        found = jax.jit(way, static_argnums=2)(x, kernel, stride)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side,stride", [(3, 2), (5, 1), (5, 2), (3, 1)])
def test_gradients_of_both_formulations_agree(side, stride):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 8, 3)).astype(np.float32)
    kernel = rng.normal(size=(side, side, 1, 3)).astype(np.float32)
    target = rng.normal(size=by_loops(x, kernel, stride).shape).astype(np.float32)

    def gradients(way):
        loss = lambda x, kernel: ((way(x, kernel, stride) - target) ** 2).sum()
        return jax.jit(jax.grad(loss, (0, 1)))(x, kernel)

    expected = gradients(depthwise_native)
    for way in (depthwise_conv, depthwise_shifted):
        for found, reference in zip(gradients(way), expected, strict=True):
            np.testing.assert_allclose(found, reference, rtol=1e-3, atol=1e-4)


def test_each_platform_compiles_its_own_formulation():
    x, kernel = jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 1, 4))
    traced = jax.jit(depthwise_conv, static_argnums=2).trace(x, kernel, 1)
    for platform, native in (("cpu", False), ("cuda", True), ("tpu", True)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.convolution" in text) == native


def test_gradients_of_a_pointwise_convolution():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 8, 3)).astype(np.float32)
    kernel = rng.normal(size=(3, 5)).astype(np.float32)

    def gradients(multiply):
        loss = lambda x, kernel: (multiply(x, kernel) ** 2).sum()
        return jax.jit(jax.grad(loss, (0, 1)))(x, kernel)

    for found, expected in zip(gradients(pointwise_conv), gradients(jnp.matmul), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def value_and_gradients(convolve, x, kernel):
    """Of a loss that weighs every position of the output differently."""

    def loss(x, kernel):
        y = convolve(x, kernel)
        weights = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return (weights * y).sum(), y

    gradients, y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, kernel)
    return y, *gradients


@settings(max_examples=20, deadline=None)
@given(
    st.tuples(st.integers(5, 9), st.integers(5, 9)),
    st.sampled_from([1, 3, 5]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([((0, 0), (0, 0)), ((1, 1), (1, 1)), ((0, 1), (2, 1)), ((3, 3), (3, 3))]),
)
def test_gradients_in_canonical_order_are_those_of_jax(size, side, stride, padding):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 3)).astype(np.float32)
    kernel = rng.normal(size=(side, side, 3, 4)).astype(np.float32)
    expected = value_and_gradients(lambda x, k: conv_native(x, k, stride, padding), x, kernel)
    for way in (conv, conv_canonical):
        found = value_and_gradients(lambda x, k, way=way: way(x, k, stride, padding), x, kernel)
        for ours, reference in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_in_canonical_order_have_the_dtype_of_the_arguments(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 8, 9, 3)), dtype)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 3, 4)), dtype)
    padding = ((1, 1), (1, 1))
    expected = value_and_gradients(lambda x, k: conv_native(x, k, 2, padding), x, kernel)
    found = value_and_gradients(lambda x, k: conv_canonical(x, k, 2, padding), x, kernel)
    for ours, reference in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        ours, reference = np.float32(ours), np.float32(reference)
        np.testing.assert_allclose(ours, reference, rtol=0.02, atol=0.02)


def test_only_cpus_compile_the_canonical_order():
    x, kernel = jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 4, 4))
    loss = lambda x, kernel: (conv(x, kernel, 1, ((1, 1), (1, 1))) ** 2).sum()
    traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, kernel)
    for platform, kinds in (("cpu", 1), ("cuda", 3), ("tpu", 3)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        orders = re.findall(r"dim_numbers = (.*), window", text)
        assert (len(orders), len(set(orders))) == (3, kinds)


@pytest.mark.parametrize(
    "side,strides,padding,groups,features",
    [(3, 1, 1, 1, 6), (3, 2, 1, 1, 6), (7, 2, 3, 1, 6), (3, 2, "SAME", 1, 6), (3, 2, 1, 2, 6)]
    + [(1, 1, "SAME", 1, 6), (1, 2, "SAME", 1, 6), (1, 1, 1, 1, 6), (1, 2, "SAME", 2, 6)]
    + [(3, 1, "SAME", 4, 4), (5, 2, "SAME", 4, 4), (3, 2, 1, 4, 4), (3, 1, "SAME", 4, 8)],
)
def test_our_module_is_flax_convolution(side, strides, padding, groups, features):
    x = np.random.default_rng(0).normal(size=(2, 9, 8, 4)).astype(np.float32)
    options = {"strides": strides, "padding": padding, "feature_group_count": groups}
    options |= {"use_bias": False, "kernel_init": KERNEL_INIT}
    ours, flax = (module(features, (side, side), **options) for module in (Conv, nn.Conv))
    variables = ours.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables, flax.init(jax.random.key(0), x))
    np.testing.assert_allclose(ours.apply(variables, x), flax.apply(variables, x), atol=1e-5)
    half = Conv(features, (side, side), dtype=jnp.bfloat16, **options)
    assert half.apply(variables, x).dtype == jnp.bfloat16


def test_a_bias_is_refused():
    with pytest.raises(ValueError, match="no bias"):
        Conv(3, (1, 1), use_bias=True).init(jax.random.key(0), jnp.zeros((1, 2, 2, 3)))


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (1, 5)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_max_pooling_has_the_values_and_gradients_of_xla(size, dtype):
    # Behind a ReLU many windows have several maxima.
    x = jax.nn.relu(jax.random.normal(jax.random.key(0), (2, *size, 3), dtype))

    def value_and_gradient(pool):
        def loss(x):
            y = pool(x)
            return (jnp.sin(jnp.arange(y.size, dtype=dtype)).reshape(y.shape) * y).sum(), y

        gradient, y = jax.jit(jax.grad(loss, has_aux=True))(x)
        assert y.dtype == gradient.dtype == dtype
        return np.float32(y), np.float32(gradient)

    expected = value_and_gradient(max_pool_native)
    tolerance = 4 * float(jnp.finfo(dtype).eps)  # where windows overlap, gradients are added
    for pool in (functools.partial(max_pool, **STEM), max_pool_taps):
        y, gradient = value_and_gradient(pool)
        np.testing.assert_array_equal(y, expected[0])
        np.testing.assert_allclose(gradient, expected[1], atol=tolerance)


def test_what_is_not_a_number_stays_visible():
    x = jnp.zeros((1, 6, 6, 1)).at[0, 2, 3, 0].set(jnp.nan)
    np.testing.assert_array_equal(max_pool_taps(x), max_pool_native(x))


def test_only_cpus_choose_among_taps():
    traced = jax.jit(jax.grad(lambda x: max_pool(x, **STEM).sum())).trace(jnp.zeros((1, 8, 8, 4)))
    for platform, native in (("cpu", False), ("cuda", True), ("tpu", True)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("select_and_scatter" in text) == native


def test_other_windows_are_left_to_flax():
    x = jax.random.normal(jax.random.key(0), (2, 6, 7, 3))
    window = {"window_shape": (2, 2), "strides": (2, 2), "padding": ((0, 0), (0, 0))}
    np.testing.assert_array_equal(max_pool(x, **window), nn.max_pool(x, **window))
