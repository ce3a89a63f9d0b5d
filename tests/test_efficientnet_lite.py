"""EfficientNet-Lite: published sizes, and depthwise convolution against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgd_jax.models.efficientnet_lite import (
    BACKBONES,
    EfficientNetLite,
    InvertedResidual,
    depthwise_conv,
    depthwise_native,
    depthwise_shifted,
)
from tests.variables import random_variables

# Parameters of the published networks, less their classifiers of 1280 × 1000 + 1000.
PUBLISHED = {
    "efficientnet_lite0": 4_652_008 - 1_281_000,
    "efficientnet_lite1": 5_416_680 - 1_281_000,
    "efficientnet_lite2": 6_092_072 - 1_281_000,
}


def shapes_of(backbone, size=224, **kwargs):
    """Shapes of variables and features, without computing anything."""
    model = BACKBONES[backbone](**kwargs)
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return variables, jax.eval_shape(model.apply, variables, images)


@pytest.mark.parametrize("backbone", PUBLISHED)
def test_parameters_and_feature_maps(backbone):
    variables, features = shapes_of(backbone)
    assert sum(a.size for a in jax.tree.leaves(variables["params"])) == PUBLISHED[backbone]
    assert features.shape == (2, 14, 14, 1280)
    assert shapes_of(backbone, last_stride=2)[1].shape == (2, 7, 7, 1280)
    assert shapes_of(backbone, 97, last_stride=2)[1].shape == (2, 4, 4, 1280)


def test_bfloat16_computes_in_it_and_keeps_float32_parameters():
    variables, features = shapes_of("efficientnet_lite0", 32, dtype=jnp.bfloat16)
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert features.dtype == jnp.bfloat16


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


@pytest.mark.parametrize("side,stride", [(3, 2), (5, 1)])
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


def test_where_the_input_is_added():
    x = jnp.ones((1, 4, 4, 8))
    for out, stride, added in ((8, 1, True), (8, 2, False), (16, 1, False)):
        block = InvertedResidual(3, stride, 6, out, jnp.float32)
        variables = random_variables(block, x, False)
        # Without the projection, what is left is the input, or nothing.
        norm = variables["params"]["project_bn"]
        norm["scale"], norm["bias"] = np.zeros(out), np.zeros(out)
        y = block.apply(variables, x, False)
        assert y.shape == (1, 4 // stride, 4 // stride, out)
        np.testing.assert_array_equal(y, x if added else jnp.zeros(y.shape))


def test_training_mode_uses_and_updates_batch_statistics():
    model = EfficientNetLite(width=0.2, depth=0.2)
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    variables = random_variables(model, images)
    train = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
    features, updates = train(variables, images)
    assert features.min() >= 0 and features.max() <= 6
    assert not np.allclose(features, jax.jit(model.apply)(variables, images))
    before, after = variables["batch_stats"], updates["batch_stats"]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert not np.allclose(old, new)
