"""The CGD network: figure 1 of the paper, part by part."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgd_jax import combination, pooling
from cgd_jax.models.cgd import CGD, Center, create_model
from cgd_jax.models.resnet import ResNet
from configs import base
from tests import quick
from tests.variables import random_variables

PAPER_SETS = "S M G SM MS SG GS MG GM SMG MSG GSM".split()


def tiny(**kwargs):
    """A CGD of a few thousand parameters with its variables."""
    backbone = ResNet(stage_sizes=(1, 1), bottleneck=False, width=16, stem="3x3")
    model = CGD(backbone=backbone, num_classes=7, embedding_dim=24, **kwargs)
    images = jax.random.normal(jax.random.key(1), (3, 16, 16, 3))
    return model, random_variables(model, images), images


@partial(jax.jit, static_argnums=0)
def apply(model, variables, images):
    return model.apply(variables, images)


def pooled(count):
    """Descriptors of three images."""
    return list(np.random.default_rng(0).gamma(2, size=(count, 3, 32)).astype(np.float32))


@pytest.mark.parametrize("letters", quick.first(["RSMG", "R", *PAPER_SETS], 3))
def test_every_descriptor_set(letters):
    model, variables, _ = tiny(descriptors=letters)
    assert {name[-1] for name in variables["params"] if name.startswith("fc_")} == set(letters)
    output = model.apply(variables, None, descriptors=pooled(len(letters)))
    assert output.embedding.shape == (3, 24) and output.logits.shape == (3, 7)
    np.testing.assert_allclose(np.linalg.norm(output.embedding, axis=1), 1, atol=1e-5)


def test_it_is_the_functions_put_together():
    model, variables, images = tiny(descriptors="GMSR")
    params, stats = variables["params"], variables["batch_stats"]
    output = apply(model, variables, images)
    features = model.backbone.apply(
        {"params": params["backbone"], "batch_stats": stats["backbone"]}, images
    )
    poolings = (pooling.gem, pooling.mac, pooling.spoc, pooling.rmac)
    descriptors = [pool(features) for pool in poolings]
    for ours, expected in zip(output.descriptors, descriptors, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
    kernels = [params[f"fc_{letter}"] for letter in "GMSR"]
    embedding, _ = combination.combine(descriptors, kernels)
    np.testing.assert_allclose(output.embedding, embedding, atol=1e-6)
    bn, fc = params["auxiliary_bn"], params["auxiliary_fc"]
    first = (descriptors[0] - stats["auxiliary_bn"]["mean"]) / np.sqrt(
        stats["auxiliary_bn"]["var"] + 1e-5
    )
    logits = (first * bn["scale"] + bn["bias"]) @ fc["kernel"] + fc["bias"]
    np.testing.assert_allclose(output.logits, logits, atol=1e-5)


@pytest.mark.parametrize("how,branches", [("concat", 1), ("sum", 1), ("separate", 2), ("raw", 1)])
def test_combinations(how, branches):
    model, variables, _ = tiny(descriptors="SG", combination=how)
    output = model.apply(variables, None, descriptors=pooled(2))
    assert output.embedding.shape == (3, 24) and len(output.ranked) == branches


@pytest.mark.parametrize("learn_p,shape", [("scalar", ()), ("channel", (32,))])
def test_learned_p_has_a_gradient(learn_p, shape):
    model, variables, images = tiny(descriptors="SG", learn_p=learn_p, gem_p=2.5)
    p = variables["params"]["gem_p_learned"]
    assert p.shape == shape and np.all(p == 2.5)
    weights = jax.random.normal(jax.random.key(2), (3, 24))

    def value(params):
        return jnp.sum(model.apply({**variables, "params": params}, images).embedding * weights)

    gradient = jax.jit(jax.grad(value))(variables["params"])["gem_p_learned"]
    assert np.mean(np.abs(gradient) > 1e-4) > 0.5  # a dead channel or two may have none


def test_a_fixed_p_is_the_exponent():
    features = np.random.default_rng(0).gamma(2, size=(2, 3, 3, 5)).astype(np.float32)
    found = CGD(None, num_classes=1, gem_p=2.0).pool("G", features)
    np.testing.assert_array_equal(found, pooling.gem(features, 2.0))


def test_only_the_first_descriptor_feeds_the_auxiliary_module():
    model, variables, images = tiny(descriptors="SG", learn_p="scalar")

    def first_logit(params):
        return model.apply({**variables, "params": params}, images).logits[0, 0]

    gradient = jax.jit(jax.grad(first_logit))(variables["params"])
    assert gradient["gem_p_learned"] == 0
    assert np.all(gradient["fc_S"] == 0), "it branches off before the FC layer"
    assert np.abs(gradient["backbone"]["conv1"]["kernel"]).max() > 0


def test_half_precision_ends_in_float32():
    model, variables, images = tiny(dtype=jnp.bfloat16)
    output = jax.eval_shape(model.apply, variables, images)
    assert output.embedding.dtype == output.logits.dtype == jnp.float32


def test_the_papers_network_has_the_size_of_its_re_implementation():
    config = base.get_config().model
    model = create_model(config, num_classes=98)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    output, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    parameters = sum(a.size for a in jax.tree.leaves(variables["params"]))
    # 26.86 M in the PyTorch re-implementation for 98 classes.
    assert round(parameters / 1e6, 2) == 26.86
    assert output.embedding.shape == (1, 1536) and output.logits.shape == (1, 98)


def test_a_frozen_batch_norm_keeps_its_statistics():
    free, variables, images = tiny()
    frozen, _, _ = tiny(freeze_batch_norm=True)
    train = jax.jit(
        lambda m, v, x: m.apply(v, x, train=True, mutable=["batch_stats"]), static_argnums=0
    )
    output, updates = train(frozen, variables, images)
    # As in evaluation, but for the auxiliary module, which is new and learns.
    np.testing.assert_allclose(
        output.embedding, apply(frozen, variables, images).embedding, atol=1e-6
    )
    before, after = variables["batch_stats"], updates["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, before["backbone"], after["backbone"])
    assert np.abs(before["auxiliary_bn"]["mean"] - after["auxiliary_bn"]["mean"]).max() > 0
    _, updates = train(free, variables, images)
    after = updates["batch_stats"]["backbone"]["bn1"]["mean"]
    assert np.abs(before["backbone"]["bn1"]["mean"] - after).max() > 0


@pytest.mark.parametrize("how, shape", [("concat", (320, 4)), ("sum", (320, 380))])
def test_fc_layers_begin_with_orthogonal_columns_or_rows(how, shape):
    def first_kernel(fc_init):
        dim = shape[1] * (2 if how == "concat" else 1)
        model = CGD(None, 3, embedding_dim=dim, combination=how, fc_init=fc_init)
        descriptors = [jnp.zeros((2, 320))] * 2
        init = jax.jit(lambda key: model.init(key, None, descriptors=descriptors))
        variables = init(jax.random.key(0))
        assert variables["params"]["fc_G"].shape == shape
        return variables["params"]["fc_G"]

    kernel = first_kernel("orthogonal")
    gram = kernel.T @ kernel if shape[1] < shape[0] else kernel @ kernel.T
    np.testing.assert_allclose(gram, np.eye(min(shape)), atol=1e-4)
    drawn = first_kernel("lecun_normal")
    assert abs(np.std(drawn) * 320**0.5 - 1) < 0.1
    assert not np.allclose(drawn.T @ drawn, np.eye(shape[1]), atol=1e-2)


def center(momentum=0.5, unit=False):
    layer = Center(unit, momentum)
    return layer, layer.init(jax.random.key(0), jnp.zeros((1, 3)), True)


def test_a_batch_is_centered_on_its_own_mean_and_no_embedding_can_be_one_point():
    layer, variables = center()
    x = jnp.asarray(np.random.default_rng(0).gamma(1.0, size=(6, 3)), jnp.float32)
    centered, _ = layer.apply(variables, x, True, mutable=["batch_stats"])
    np.testing.assert_allclose(centered, x - np.mean(x, 0), atol=1e-6)
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)), jnp.float32)
    length = jnp.linalg.norm(centered @ kernel, axis=1, keepdims=True)
    unit, _ = combination.combine([centered], [kernel])
    np.testing.assert_allclose((length * unit).sum(0), 0, atol=1e-5)


def test_of_directions_an_image_far_longer_than_the_others_counts_as_one():
    x = np.random.default_rng(0).gamma(9.0, size=(64, 3)).astype(np.float32)
    x[0] *= 1000
    norms = []
    for unit in (False, True):
        layer, variables = center(unit=unit)
        centered, _ = layer.apply(variables, x, True, mutable=["batch_stats"])
        directions = x / np.linalg.norm(x, axis=1, keepdims=True) if unit else x
        np.testing.assert_allclose(centered, directions - directions.mean(0), rtol=1e-4, atol=1e-6)
        (embedding,) = combination.combine([centered], [jnp.eye(3)])[1]
        norms.append(float(jnp.linalg.norm(embedding.mean(0))))
    assert norms[0] > 0.95, "the one long descriptor decides on the mean of all"
    assert norms[1] < 0.3
    # A zero descriptor has no direction, but a finite gradient.
    layer, variables = center(unit=True)
    gradient = jax.grad(lambda x: layer.apply(variables, x, False).sum())(jnp.zeros((2, 3)))
    assert np.isfinite(gradient).all()


def test_the_mean_of_evaluation_is_that_of_the_batches_without_the_first_zero():
    layer, variables = center(momentum=0.5)
    x = jnp.ones((2, 3))
    np.testing.assert_array_equal(layer.apply(variables, x, False), x)  # nothing seen yet
    for batch in ([1.0, 3.0], [7.0, 5.0]):
        rows = jnp.tile(jnp.array(batch)[:, None], 3)
        _, variables = layer.apply(variables, rows, True, mutable=["batch_stats"])
    expected = (0.5 * 2 + 1 * 6) / 1.5  # the later batch weighs twice the earlier
    np.testing.assert_allclose(layer.apply(variables, 0 * x, False), -expected * x, rtol=1e-6)


def test_the_gradient_passes_through_the_mean():
    layer, variables = center()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    weights = jnp.arange(12.0).reshape(4, 3)
    apply = lambda x: layer.apply(variables, x, True, mutable=["batch_stats"])[0]
    gradient = jax.grad(lambda x: jnp.sum(weights * apply(x)))(x)
    np.testing.assert_allclose(gradient, weights - weights.mean(0), atol=1e-5)


@pytest.mark.parametrize("combination_,how", [("concat", "mean"), ("raw", "direction")])
def test_a_centered_network_keeps_its_raw_descriptors(combination_, how):
    model, variables, images = tiny(combination=combination_, center=how)
    output, updates = model.apply(variables, images, True, mutable=["batch_stats"])
    for letter, descriptor in zip("SG", output.descriptors, strict=True):
        before = variables["batch_stats"][f"center_{letter}"]["mean"]
        mean = updates["batch_stats"][f"center_{letter}"]["mean"]
        if how == "direction":
            descriptor = descriptor / jnp.linalg.norm(descriptor, axis=1, keepdims=True)
        np.testing.assert_allclose(mean - 0.9 * before, 0.1 * descriptor.mean(0), atol=1e-5)
    assert output.descriptors[0].min() >= 0, "what the auxiliary module sees is not centered"
    _, plain, _ = tiny(combination=combination_)
    assert "center_S" not in plain["batch_stats"]
    jax.tree.map(
        lambda a, b: np.testing.assert_equal(a.shape, b.shape), plain["params"], variables["params"]
    )
