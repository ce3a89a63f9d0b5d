"""Convolutions written otherwise than XLA's: against loops, and against XLA's own."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from cgd_jax.models.conv import (
    Conv,
    PointwiseConv,
    conv,
    conv_canonical,
    conv_native,
    depthwise_conv,
    depthwise_native,
    depthwise_shifted,
    kernel_init,
    pointwise_conv,
)


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


@pytest.mark.parametrize("stride", [1, 2])
def test_pointwise_convolution_is_a_convolution(stride):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 8, 3)).astype(np.float32)
    variables = {"params": {"kernel": rng.normal(size=(1, 1, 3, 5)).astype(np.float32)}}
    ours = PointwiseConv(5, stride)
    flax = nn.Conv(5, (1, 1), strides=stride, use_bias=False)
    np.testing.assert_allclose(ours.apply(variables, x), flax.apply(variables, x), atol=1e-5)
    shape = jax.eval_shape(ours.init, jax.random.key(0), x)["params"]["kernel"].shape
    assert shape == (1, 1, 3, 5)
    half = PointwiseConv(5, stride, jnp.bfloat16)
    assert half.apply(variables, x).dtype == jnp.bfloat16


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
    "side,stride,padding,groups",
    [(3, 1, 1, 1), (3, 2, 1, 1), (7, 2, 3, 1), (3, 2, "SAME", 1), (3, 2, 1, 2)],
)
def test_our_module_is_flax_convolution(side, stride, padding, groups):
    x = np.random.default_rng(0).normal(size=(2, 9, 8, 4)).astype(np.float32)
    ours = Conv(6, side, stride, padding, groups)
    flax = nn.Conv(
        6,
        (side, side),
        stride,
        padding,
        use_bias=False,
        feature_group_count=groups,
        kernel_init=kernel_init,
    )
    variables = ours.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables, flax.init(jax.random.key(0), x))
    np.testing.assert_allclose(ours.apply(variables, x), flax.apply(variables, x), atol=1e-5)
    half = Conv(6, side, stride, padding, groups, jnp.bfloat16)
    assert half.apply(variables, x).dtype == jnp.bfloat16
