"""Convolutions written otherwise than XLA's: against loops, and against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from cgd_jax.models.conv import (
    PointwiseConv,
    depthwise_conv,
    depthwise_native,
    depthwise_shifted,
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
    for conv in (depthwise_conv, depthwise_native, depthwise_shifted):
        found = jax.jit(conv, static_argnums=2)(x, kernel, stride)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side,stride", [(3, 2), (5, 1), (5, 2), (3, 1)])
def test_gradients_of_both_formulations_agree(side, stride):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 8, 3)).astype(np.float32)
    kernel = rng.normal(size=(side, side, 1, 3)).astype(np.float32)
    target = rng.normal(size=by_loops(x, kernel, stride).shape).astype(np.float32)

    def gradients(conv):
        loss = lambda x, kernel: ((conv(x, kernel, stride) - target) ** 2).sum()
        return jax.jit(jax.grad(loss, (0, 1)))(x, kernel)

    expected = gradients(depthwise_native)
    for conv in (depthwise_conv, depthwise_shifted):
        for found, reference in zip(gradients(conv), expected, strict=True):
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
