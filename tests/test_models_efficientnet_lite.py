"""EfficientNet-Lite: published sizes, and its blocks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cgd_jax.models.efficientnet_lite import BACKBONES, EfficientNetLite, InvertedResidual
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


def test_where_the_input_is_added():
    x = jnp.ones((1, 4, 4, 8))
    for out, stride, added in ((8, 1, True), (8, 2, False), (16, 1, False)):
        norm = partial(nn.BatchNorm, use_running_average=True)
        block = InvertedResidual(3, stride, 6, out, partial(nn.Conv, use_bias=False), norm)
        variables = random_variables(block, x)
        # Without the projection, what is left is the input, or nothing.
        norm = variables["params"]["project_bn"]
        norm["scale"], norm["bias"] = np.zeros(out), np.zeros(out)
        y = block.apply(variables, x)
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
