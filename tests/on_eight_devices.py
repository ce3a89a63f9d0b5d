"""A program for eight simulated devices, which test_train_step.py starts: all of it must hold."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cgd_jax import (
    checkpoint,
    losses,
    metrics,
    optimizer,
    ranking,
    retrieval,
    sharding,
    train_step,
)
from cgd_jax.models.cgd import CGD
from cgd_jax.models.resnet import ResNet
from cgd_jax.sharding import shardings
from configs import glyphs

STEPS = 12


def mesh_of(count):
    axis = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((count,), ("data",), axis, devices=jax.devices()[:count])


def training_is_the_same_and_resumes_what_others_began(folder):
    """On one, two and eight devices."""
    config = glyphs.get_config()
    # A rate at which the steps do not amplify what is rounded otherwise beyond 1e-5.
    config.train.steps, config.optimizer.learning_rate, config.data.image_size = STEPS, 1e-3, 16
    config.loss.batch_hard_triplet.margin = 0.5
    # A memory that begins in the middle, and class centers: all devices hold the same.
    config.loss.update(memory=48, memory_from=4, classification="normalized_softmax", sub_centers=2)
    rng = np.random.default_rng(0)
    batches = rng.integers(0, 256, (STEPS, 32, 16, 16, 3)).astype(np.uint8)
    labels = np.repeat(np.arange(16, dtype=np.int32), 2)
    # One stage in place of four, which every number of devices compiles anew.
    backbone = ResNet(stage_sizes=(1,), bottleneck=False, width=4, stem="3x3")
    model = CGD(backbone, num_classes=16, embedding_dim=8, center="mean")
    descent = optimizer.make_optimizer(config.optimizer, STEPS, proxies=True)

    def start(count, shard="none"):
        """The state at step 0 on so many devices, and a function that goes on to the last step."""
        _, split = shardings(mesh_of(count))
        config.train.shard = shard
        layout = train_step.layout_of_state(config, model, descent, mesh_of(count))
        step = train_step.make_train_step(config, model, descent, mesh_of(count))

        def go_on(state, checkpoints=None):
            sequence = []
            for images in batches[int(state.step) :]:
                state, measured = step(state, *jax.device_put((images, labels), split))
                sequence.append(float(measured["loss"]))
                if checkpoints and state.step == STEPS // 2:
                    checkpoint.save(checkpoints, state)
            return sequence, jax.tree.map(np.asarray, (state.params, state.memory))

        return jax.device_put(jax.tree.map(np.asarray, drawn), layout), go_on

    def assert_same(found, expected):
        np.testing.assert_allclose(found[0], expected[0][-len(found[0]) :], rtol=1e-5)
        difference = jax.tree.map(np.subtract, found[1], expected[1])
        assert optax.tree.norm(difference) < 1e-5 * optax.tree.norm(expected[1])

    drawn = train_step.create_state(config, model, descent, mesh_of(8))
    sharding.SMALL = 100
    layouts = ((1, "none"), (2, "none"), (8, "none"), (8, "parameters"))
    states, go_on = zip(*(start(*layout) for layout in layouts), strict=True)
    kernel = states[3].opt_state, states[3].memory.vectors
    for array in jax.tree.leaves(kernel):  # the large ones
        if array.size >= 100 and any(length % 8 == 0 for length in array.shape):
            assert 8 * array.addressable_shards[0].data.size == array.size
    alone = go_on[0](jax.tree.map(jnp.copy, states[0]))
    assert alone[0][0] != alone[0][-1]
    with checkpoint.manager(f"{folder}/two", keep=1) as checkpoints:
        assert_same(go_on[1](states[1], checkpoints), alone)
    assert_same(go_on[2](jax.tree.map(jnp.copy, states[2])), alone)
    with checkpoint.manager(f"{folder}/divided", keep=1) as checkpoints:
        assert_same(go_on[3](jax.tree.map(jnp.copy, states[3]), checkpoints), alone)
    # What others have begun, each brings to the same end.
    for begun, then in (("two", 0), ("two", 2), ("two", 3), ("divided", 0), ("divided", 2)):
        with checkpoint.manager(f"{folder}/{begun}", keep=1) as checkpoints:
            saved = checkpoint.restore_latest(checkpoints, states[then])
        wanted, restored = (jax.tree.map(lambda x: x.sharding, s) for s in (states[then], saved))
        assert wanted == restored
        found = go_on[then](saved)
        assert len(found[0]) == STEPS // 2
        assert_same(found, alone)


def losses_see_the_whole_batch():
    """The hardest negative of every image sits on another device."""
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
    sharded = jax.device_put((vectors, labels), shardings(mesh_of(2))[1])
    loss = jax.jit(losses.batch_hard_triplet_loss, static_argnums=2)(*sharded, 0.5)
    np.testing.assert_allclose(loss, hinge(every).mean(), rtol=1e-5)
    losses.ranking.BLOCK = 16  # two anchors at a time, one of each device
    jax.clear_caches()
    loss = jax.jit(losses.batch_hard_triplet_loss, static_argnums=2)(*sharded, 0.5)
    np.testing.assert_allclose(loss, hinge(every).mean(), rtol=1e-5)
    losses.ranking.BLOCK = 2**24
    # Proxies and centers are on every device, images on one.
    proxies = losses.create_proxies(jax.random.key(0), 4, 1, 2)
    for name, loss in (losses.PROXY_LOSSES | losses.CENTER_LOSSES).items():
        found = jax.jit(loss)(*sharded, proxies)
        expected = loss(vectors, labels, proxies)
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=name)


MESHES = (
    jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",)),
    jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("host", "device")),
    jax.make_mesh((8,), ("data",)),  # of explicit axes
)


def ranks_are_the_same():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(203, 9)), rng.integers(0, 40, 203)
    x[rng.integers(0, 203, 60)] = x[rng.integers(0, 203, 60)]  # ties within and across shards
    searched = x, labels, x[rng.permutation(203)[:101]], rng.integers(0, 40, 101)
    itself, alone = metrics.evaluate(x, labels), metrics.evaluate(*searched)
    assert metrics.evaluate(x, labels, mesh=MESHES[-1]) == itself
    for mesh in MESHES:
        assert metrics.evaluate(*searched, mesh=mesh) == alone, mesh
    ranking.is_cpu = lambda mesh: False  # as on an accelerator
    for mesh in (None, *MESHES[:2]):
        assert metrics.evaluate(*searched, mesh=mesh) == alone, mesh


def the_nearest_are_the_same():
    rng = np.random.default_rng(0)
    query, gallery = (rng.integers(-2, 3, (n, 6)).astype(np.float32) for n in (13, 203))
    exclude = rng.integers(-1, 203, 13)
    for k, block in ((3, 2**16), (60, 30)):
        retrieval.ITEMS = block
        alone = retrieval.top_k(query, gallery, k, exclude=exclude)
        for mesh in MESHES:
            shared = retrieval.top_k(query, gallery, k, mesh=mesh, exclude=exclude)
            assert all(map(np.array_equal, alone, shared)), (mesh, k)


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    the_nearest_are_the_same()
    ranks_are_the_same()
    losses_see_the_whole_batch()
    training_is_the_same_and_resumes_what_others_began(sys.argv[1])
