"""EfficientNet-Lite: its blocks, and their statistics."""

import jax
import jax.numpy as jnp
import numpy as np

from cgd_jax.models.efficientnet_lite import EfficientNetLite, InvertedResidual
from cgd_jax.models.layers import ConvNet
from tests.variables import random_variables


def test_where_the_input_is_added():
    x = jnp.ones((1, 4, 4, 8))
    for out, stride, added in ((8, 1, True), (8, 2, False), (16, 1, False)):
        block = InvertedResidual(3, stride, 6, out, ConvNet().make_layer(train=False))
        variables = random_variables(block, x)
        # Without the projection, what is left is the input, or nothing.
        norm = variables["params"]["project_bn"]
        norm["scale"], norm["bias"] = np.zeros(out), np.zeros(out)
        y = block.apply(variables, x)
        assert y.shape == (1, 4 // stride, 4 // stride, out)
        np.testing.assert_array_equal(y, x if added else jnp.zeros(y.shape))


def test_training_mode_uses_and_updates_batch_statistics():
    model = EfficientNetLite(width=0.1, depth=0.1)
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    variables = random_variables(model, images)
    train = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
    features, updates = train(variables, images)
    assert features.min() >= 0 and features.max() <= 6
    assert not np.allclose(features, jax.jit(model.apply)(variables, images))
    before, after = variables["batch_stats"], updates["batch_stats"]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert not np.allclose(old, new)
