"""A program for eight simulated devices, which test_train_step.py starts: all of it must hold."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from cgd_jax import checkpoint, losses, optimizer, train_step
from cgd_jax.models.cgd import CGD
from cgd_jax.models.resnet import ResNet
from configs import glyphs


def mesh_of(count):
    axis = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((count,), ("data",), axis, devices=jax.devices()[:count])


config = glyphs.get_config()
# A rate at which 20 steps do not amplify what is rounded otherwise beyond 1e-5.
config.train.steps, config.optimizer.learning_rate, config.data.image_size = 20, 1e-3, 16
config.loss.batch_hard_triplet.margin = 0.5
# A memory that begins in the middle, and class centers: all devices hold the same.
config.loss.update(memory=48, memory_from=7, classification="normalized_softmax", sub_centers=2)
rng = np.random.default_rng(0)
batches = rng.integers(0, 256, (20, 32, 16, 16, 3)).astype(np.uint8)
labels = np.repeat(np.arange(16, dtype=np.int32), 2)
# Two stages in place of four, which every number of devices compiles anew.
backbone = ResNet(stage_sizes=(1, 1), bottleneck=False, width=4, stem="3x3")
model = CGD(backbone, num_classes=16, embedding_dim=8, center="mean")


def start(count):
    """The state at step 0 on so many devices, and a function that goes on to the last step."""
    mesh = mesh_of(count)
    replicated, split = train_step.shardings(mesh)
    descent = optimizer.make_optimizer(config.optimizer, 20, proxies=True)
    step = train_step.make_train_step(config, model, descent, mesh)

    def go_on(state, checkpoints=None):
        sequence = []
        for images in batches[int(state.step) :]:
            state, metrics = step(state, *jax.device_put((images, labels), split))
            sequence.append(float(metrics["loss"]))
            if checkpoints and state.step == 10:
                checkpoint.save(checkpoints, state)
        return sequence, jax.tree.map(np.asarray, (state.params, state.memory))

    return train_step.create_state(config, model, descent, replicated), go_on


norm = lambda x: np.sqrt(sum(np.sum(np.square(a)) for a in jax.tree.leaves(x)))


def assert_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0][-len(found[0]) :], rtol=1e-5)
    gap = norm(jax.tree.map(np.subtract, found[1], expected[1])) / norm(expected[1])
    assert gap < 1e-5, gap


states, go_on = zip(*map(start, (1, 2, 8)), strict=True)
alone = go_on[0](jax.tree.map(jnp.copy, states[0]))
assert alone[0][0] != alone[0][-1]
with checkpoint.manager(sys.argv[1], keep=1) as checkpoints:
    assert_same(go_on[1](states[1], checkpoints), alone)
assert_same(go_on[2](jax.tree.map(jnp.copy, states[2])), alone)

# What two devices have begun, one and eight bring to the same end.
for state, resume, devices in ((states[0], go_on[0], 1), (states[2], go_on[2], 8)):
    with checkpoint.manager(sys.argv[1], keep=1) as checkpoints:
        saved = checkpoint.restore_latest(checkpoints, state)
    assert len(saved.params["fc_S"].sharding.device_set) == devices
    found = resume(saved)
    assert len(found[0]) == 10
    assert_same(found, alone)

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

# Proxies and centers are on every device, images on one.
proxies = losses.create_proxies(jax.random.key(0), 4, 1, 2)
for name, loss in (losses.PROXY_LOSSES | losses.CENTER_LOSSES).items():
    found = jax.jit(loss)(*sharded, proxies)
    np.testing.assert_allclose(found, loss(vectors, labels, proxies), rtol=1e-5, err_msg=name)
