"""The training step: losses put together, gradients in chunks, recomputation, several devices."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from cgd_jax import gradient_caching, losses, objective, train_step
from cgd_jax.models.cgd import Output, compute_dtype, create_model
from cgd_jax.models.efficientnet_lite import EfficientNetLite
from cgd_jax.models.resnet import ResNet
from cgd_jax.preprocess import IMAGENET
from configs import base, glyphs
from tests import quick, tiny  # noqa: F401, the backbone resnet6
from tests.variables import assert_same


@pytest.mark.slow
def test_any_number_of_devices_computes_the_same(tmp_path):
    """Trains, ranks and searches; resumes what other numbers began. See on_eight_devices.py."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, "-m", "tests.on_eight_devices", str(tmp_path)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
    )
    assert run.returncode == 0, run.stderr.decode()


def losses_of(config, vectors, logits, labels):
    """The total loss, and the ranking and the classification loss in it."""
    output, key = Output(None, vectors, logits, None), jax.random.key(0)
    total, metrics = objective.measure_losses(config, labels, output, key=key)
    return total, metrics["ranking_loss"], metrics["classification_loss"]


def test_total_loss_is_the_weighted_sum_and_a_weight_of_zero_switches_off():
    config = base.get_config().loss
    rng = np.random.default_rng(0)
    vectors = [jnp.asarray(rng.normal(size=(6, 4)), jnp.float32) for _ in range(2)]
    logits = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)
    labels = jnp.array([0, 0, 1, 1, 2, 2])
    config.update(ranking_weight=2.0, classification_weight=3.0)
    config.batch_hard_triplet.margin = 0.7
    config.temperature = 0.2
    total, ranking, classification = losses_of(config, vectors, logits, labels)
    # Rival A: the mean of the losses of its branches.
    expected = np.mean([losses.batch_hard_triplet_loss(v, labels, 0.7) for v in vectors])
    np.testing.assert_allclose(ranking, expected, rtol=1e-6)
    expected = losses.smoothed_cross_entropy(logits, labels, temperature=0.2)
    np.testing.assert_allclose(classification, expected)
    np.testing.assert_allclose(total, 2 * ranking + 3 * classification, rtol=1e-6)
    config.classification_weight = 0.0
    nan = jnp.full((6, 3), jnp.nan)
    total, _, classification = losses_of(config, vectors, nan, labels)
    assert classification == 0 and total == 2 * ranking
    config.update(ranking_weight=0.0, classification_weight=1.0)
    total, ranking, _ = losses_of(config, [vectors[0] * jnp.nan], logits, labels)
    assert ranking == 0 and np.isfinite(total)


@pytest.mark.parametrize("name", quick.first(losses.RANKING_LOSSES, 4))
def test_every_ranking_loss_takes_the_options_of_the_config(name):
    config = base.get_config().loss
    config.ranking = name
    vectors = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    labels = jnp.array([0, 0, 1, 1, 2, 2])
    vectors *= 0.1  # close together: every loss is at work
    before = losses_of(config, [vectors], jnp.zeros((6, 3)), labels)[1]
    for option in config[name]:
        changed = ConfigDict(config)
        whole = {"ks": (1,), "mixup": 1}
        value = whole[option] if option in whole else 1.7 * config[name][option]
        changed[name][option] = value
        after = losses_of(changed, [vectors], jnp.zeros((6, 3)), labels)[1]
        if option != "mining_margin":  # may mine the same pairs
            assert before != after, f"{name}.{option} does nothing"


def problem(loss=None, **values):
    """A tiny network with its first state, 12 images in 4 classes, and the losses of the config."""
    config = glyphs.get_config()
    config.model.update({"backbone": "resnet6", "width": 4, "embedding_dim": 8, **values})
    config.loss.update(loss or {})
    config.data.image_size = 16
    model = create_model(config.model, 4)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(12, 16, 16, 3)), jnp.float32)
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    state = train_step.create_state(config, model, optax.identity(), mesh)
    labels = jnp.asarray(np.repeat(np.arange(4), 3))
    return config, model, (state, images, labels)


def test_training_may_see_smaller_crops_than_tests():
    config, _, (state, _, _) = problem()
    config.augment.pad = 0
    images = np.random.default_rng(1).integers(0, 256, (3, 20, 20, 3), np.uint8)
    assert train_step.prepare(config, state, images).shape == (3, 16, 16, 3)
    config.data.update(crop_size=12, image_size=24)
    assert train_step.prepare(config, state, images).shape == (3, 12, 12, 3)


def assert_close(tree, other, tolerance):
    """The norm of the difference, relative to the norm."""
    norm = lambda x: np.sqrt(sum(np.sum(np.square(a)) for a in jax.tree.leaves(x)))
    error = norm(jax.tree.map(np.subtract, tree, other)) / norm(other)
    assert error <= tolerance


def direct(config, model, arguments):
    return jax.jit(functools.partial(train_step.gradients_of_batch, config, model))(*arguments)


def in_chunks(config, model, arguments, chunk):
    config.train.gradient_cache_chunk = chunk
    return gradient_caching.make_gradients_of_batch(config, model)(*arguments)


# With a memory and centers of classes, which have a gradient too.
REMEMBERED = {
    "ranking": "contrastive", "miner": "distance_weighted", "memory": 24,
    "classification": "cosface", "sub_centers": 2, "classification_weight": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "chunk,learn_p,center,loss",
    [
        pytest.param(1, "fixed", "none", {}, marks=pytest.mark.slow),
        (4, "channel", "mean", REMEMBERED),
    ],
)
def test_chunks_give_the_gradient_of_the_whole_batch(chunk, learn_p, center, loss):
    network = {"freeze_batch_norm": True, "learn_p": learn_p, "center": center}
    config, model, arguments = problem(loss, **network)
    if loss:
        vectors = jnp.asarray(np.random.default_rng(1).normal(size=(24, 8)), jnp.float32)
        memory = losses.Memory(vectors, jnp.arange(24) % 4)
        arguments = (arguments[0].replace(memory=memory), *arguments[1:])
    expected, stats, metrics, output = direct(config, model, arguments)
    found, found_stats, found_metrics, found_output = in_chunks(config, model, arguments, chunk)
    assert np.abs(expected["backbone"]["conv1"]["kernel"]).max() > 0
    assert metrics["ranking_loss"] > 0 and metrics["classification_loss"] > 0
    assert ("loss" in expected) == bool(loss)
    assert_close(found, expected, 1e-5)
    assert_close(found_stats, stats, 1e-5)  # the auxiliary module saw the whole batch
    assert_close(found_metrics, metrics, 1e-5)
    assert_close(found_output, output, 1e-5)  # in the order of the labels
    assert ("center_S" in stats) == (center == "mean")


def test_a_step_tells_which_loss_pulls_how_much():
    config, model, (state, images, labels) = problem(center="mean")
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    pool = jax.jit(lambda images: model.apply(variables, images))
    pooled = pool(images)

    def described(ranking, classification):
        config.loss.update(ranking_weight=ranking, classification_weight=classification)
        return jax.jit(functools.partial(train_step.describe_step, config, model))(
            state, pooled, labels
        )

    def norm_of_gradient():
        def total(descriptors):
            output, _ = model.apply(
                variables, None, train=True, descriptors=descriptors, mutable=["batch_stats"]
            )
            return objective.measure_losses(config.loss, labels, output)[0]

        return optax.tree.norm(jax.jit(jax.grad(total))(pooled.descriptors))

    both = described(2.0, 3.0)
    ranking = described(2.0, 0.0)  # each alone: the gradient of the total is its own
    norm = norm_of_gradient()
    np.testing.assert_allclose([both["ranking_gradient"], ranking["ranking_gradient"]], norm, 1e-4)
    assert ranking["classification_gradient"] == 0 < norm
    classification, norm = described(0.0, 3.0), norm_of_gradient()
    np.testing.assert_allclose(both["classification_gradient"], norm, 1e-4)
    assert classification["ranking_gradient"] == 0 < norm
    assert both["active_triplets"] == 1 and both["mean_embedding_norm"] < 0.5  # centered


def test_a_step_in_bfloat16_measures_itself_in_float32():
    """The default of a GPU and a TPU."""
    config, model, (state, images, labels) = problem(
        {"classification_weight": 1.0}, dtype="bfloat16"
    )
    forward = lambda images: model.apply(state.variables(), images, True, mutable=["batch_stats"])
    output, _ = jax.jit(forward)(images)
    assert {pooled.dtype for pooled in output.descriptors} == {jnp.dtype("bfloat16")}
    describe = functools.partial(train_step.describe_step, config, model)
    found = jax.jit(describe)(state, output, labels)
    norms = np.array([found["ranking_gradient"], found["classification_gradient"]])
    # A number of bfloat16 has 16 bits of zeros behind it.
    assert norms.dtype == np.float32 and np.all(norms.view(np.uint32) & 0xFFFF)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_not_finite_does_not_get_into_the_weights(bad):
    config, descent = glyphs.get_config(), optax.adam(0.1)
    config.optimizer.ema_decay = 0.5
    params = {"w": jnp.ones(2)}
    state = train_step.State(
        step=jnp.int32(3),
        params=params,
        batch_stats={"mean": jnp.zeros(2)},
        opt_state=descent.init(params),
        normalization=IMAGENET,
        average={"w": jnp.full(2, 7.0)},
        skipped=jnp.int32(0),
    )
    update = functools.partial(train_step.update, config, descent)
    loss = jnp.inf if bad == "loss" else 1.0
    gradients = {"w": jnp.array([1.0, jnp.nan if bad == "gradient" else 1.0])}
    new = update(state, gradients, {"mean": jnp.ones(2)}, loss)
    assert (new.step, new.skipped) == (4, 1)
    assert_same(new.replace(step=state.step, skipped=state.skipped), state)
    assert update(new, gradients, new.batch_stats, loss).skipped == 2
    new = update(new, {"w": jnp.ones(2)}, {"mean": jnp.ones(2)}, 1.0)
    assert (new.step, new.skipped) == (5, 0)
    assert np.all(new.params["w"] < 1) and np.all(new.average["w"] < 7)
    np.testing.assert_array_equal(new.batch_stats["mean"], 1)


def test_statistics_of_chunks_are_averaged():
    config, model, (state, images, labels) = problem()
    _, stats, _, _ = in_chunks(config, model, (state, images, labels), 4)
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
    plain, recomputed = (direct(*problem(remat=remat)) for remat in (False, True))
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
