"""The training step: gradients in chunks, recomputed activations, several devices."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgd_jax import train_step
from cgd_jax.augment import IMAGENET
from cgd_jax.models.cgd import compute_dtype, create_model
from cgd_jax.models.efficientnet_lite import EfficientNetLite
from cgd_jax.models.resnet import ResNet
from configs import glyphs
from tests.variables import random_variables

ROOT = Path(__file__).parents[1]


def problem(**values):
    """A tiny network with its state, 12 images in 4 classes, and the losses of the config."""
    config = glyphs.get_config()
    config.model.update({"width": 4, "embedding_dim": 8, **values})
    model = create_model(config.model, 4)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(12, 16, 16, 3)), jnp.float32)
    variables = jax.tree.map(jnp.asarray, random_variables(model, images))
    state = train_step.State(
        jnp.int32(0), variables["params"], variables["batch_stats"], (), IMAGENET, None, 0
    )
    labels = jnp.asarray(np.repeat(np.arange(4), 3))
    loss = functools.partial(train_step.measure_losses, config.loss, labels)
    return model, state, images, loss


def assert_close(tree, other, tolerance):
    """The norm of the difference, relative to the norm."""
    norm = lambda x: np.sqrt(sum(np.sum(np.square(a)) for a in jax.tree.leaves(x)))
    error = norm(jax.tree.map(np.subtract, tree, other)) / norm(other)
    assert error <= tolerance


def gradients(function, model, state, images, loss, **options):
    return jax.jit(lambda state, images: function(model, state, images, loss, **options))(
        state, images
    )


@pytest.mark.parametrize("chunk,learn_p", [(1, "fixed"), (4, "channel")])
def test_chunks_give_the_gradient_of_the_whole_batch(chunk, learn_p):
    parts = problem(freeze_batch_norm=True, learn_p=learn_p)
    expected, stats, metrics = gradients(train_step.direct_gradients, *parts)
    found, found_stats, found_metrics = gradients(train_step.chunked_gradients, *parts, chunk=chunk)
    assert np.abs(expected["backbone"]["conv1"]["kernel"]).max() > 0
    assert metrics["ranking_loss"] > 0 and metrics["classification_loss"] > 0
    assert_close(found, expected, 2e-5)  # float32; what is left is the order of summation
    assert_close(found_stats, stats, 1e-5)  # the auxiliary module saw the whole batch
    assert_close(found_metrics, metrics, 1e-5)


def test_statistics_of_chunks_are_averaged():
    model, state, images, loss = problem()
    _, stats, _ = gradients(train_step.chunked_gradients, model, state, images, loss, chunk=4)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    update = jax.jit(lambda x: model.apply(variables, x, train=True, mutable=["batch_stats"])[1])
    updates = [update(images[i::3])["batch_stats"]["backbone"] for i in range(3)]
    mean = jax.tree.map(lambda *x: sum(x) / 3, *updates)
    assert_close(stats["backbone"], mean, 1e-5)
    changed = np.abs(
        stats["backbone"]["bn1"]["mean"] - state.batch_stats["backbone"]["bn1"]["mean"]
    )
    assert changed.max() > 0


def test_recomputed_activations_change_nothing():
    parts = [problem(remat=remat) for remat in (False, True)]
    plain, recomputed = (gradients(train_step.direct_gradients, *p) for p in parts)
    assert_close(recomputed, plain, 1e-5)


@pytest.mark.parametrize("backbone", [ResNet, EfficientNetLite])
@pytest.mark.parametrize("remat", [False, True])
def test_every_backbone_recomputes_when_told_to(backbone, remat):
    size = {"stage_sizes": (1, 1)} if backbone is ResNet else {"width": 0.2, "depth": 0.2}
    model = backbone(**size, remat=remat)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    program = jax.make_jaxpr(model.init, static_argnums=2)(jax.random.key(0), images, True)
    assert ("remat" in str(program)) == remat


def test_auto_is_float32_on_a_cpu():
    assert compute_dtype("auto") == jnp.float32
    assert compute_dtype("bfloat16") == jnp.bfloat16


DEVICES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from cgd_jax import losses, optimizer, train_step
from cgd_jax.models.cgd import create_model
from configs import glyphs

def mesh_of(count):
    axis = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((count,), ("data",), axis, devices=jax.devices()[:count])

config = glyphs.get_config()
config.model.width, config.model.embedding_dim, config.train.steps = 4, 8, 20
config.loss.batch_hard_triplet.margin = 0.5
rng = np.random.default_rng(0)
batches = rng.integers(0, 256, (20, 32, 32, 32, 3)).astype(np.uint8)
labels = np.repeat(np.arange(16, dtype=np.int32), 2)
model = create_model(config.model, 16)
found = {}
for count in (1, 2, 4, 8):
    mesh = mesh_of(count)
    replicated, split = train_step.shardings(mesh)
    descent = optimizer.make_optimizer(config.optimizer, 20)
    state = train_step.create_state(model, descent, 0, 32, replicated)
    step = train_step.make_train_step(config, model, descent, mesh)
    sequence = []
    for images in batches:
        state, metrics = step(state, *jax.device_put((images, labels), split))
        sequence.append(float(metrics["loss"]))
    found[count] = sequence, jax.tree.map(np.asarray, state.params)
for count in (2, 4, 8):
    np.testing.assert_allclose(found[count][0], found[1][0], rtol=1e-5)
    norm = lambda x: np.sqrt(sum(np.sum(np.square(a)) for a in jax.tree.leaves(x)))
    gap = norm(jax.tree.map(np.subtract, found[count][1], found[1][1])) / norm(found[1][1])
    assert gap < 1e-5, (count, gap)
    print(count, gap)
assert found[1][0][0] != found[1][0][-1]

# The hardest negative of every image sits on another device.
angle = np.array([0.0, 0.3, 1.0, 1.4, 0.1, 0.2, 1.1, 1.2])
labels = np.array([0, 0, 1, 1, 2, 2, 3, 3])
vectors = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
distance = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
same = labels[:, None] == labels[None]
def hinge(visible):
    positive = np.where(same & visible, distance, -1).max(1)
    negative = np.where(~same & visible, distance, 9).min(1)
    return np.maximum(0.5 + positive - negative, 0)
every = np.ones((8, 8), bool)
device = np.arange(8) // 4
assert not np.allclose(hinge(every), hinge(device[:, None] == device[None]))
sharded = jax.device_put((vectors, labels), train_step.shardings(mesh_of(2))[1])
loss = jax.jit(losses.batch_hard_triplet_loss, static_argnums=2)(*sharded, 0.5)
np.testing.assert_allclose(loss, hinge(every).mean(), rtol=1e-5)
"""


def test_any_number_of_devices_computes_the_same():
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", DEVICES], env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
