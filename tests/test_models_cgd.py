"""The CGD network: figure 1 of the paper, part by part."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgd_jax import combination, pooling
from cgd_jax.models.cgd import CGD, Center, create_model
from cgd_jax.models.resnet import BACKBONES
from configs import base
from tests.variables import random_variables

PAPER_SETS = "S M G SM MS SG GS MG GM SMG MSG GSM".split()


def tiny(**kwargs):
    """A CGD of a few thousand parameters with its variables."""
    backbone = BACKBONES["resnet10"](width=4, stem="3x3")
    model = CGD(backbone=backbone, num_classes=7, embedding_dim=24, **kwargs)
    images = jax.random.normal(jax.random.key(1), (3, 16, 16, 3))
    return model, random_variables(model, images), images


@partial(jax.jit, static_argnums=(0, 3))
def apply(model, variables, images, return_descriptors=False):
    return model.apply(variables, images, return_descriptors=return_descriptors)


@pytest.mark.parametrize("letters", [*PAPER_SETS, "R", "RSMG"])
def test_every_descriptor_set(letters):
    model, variables, images = tiny(descriptors=letters)
    output = apply(model, variables, images, True)
    assert output.embedding.shape == (3, 24) and output.logits.shape == (3, 7)
    assert [d.shape for d in output.descriptors] == [(3, 32)] * len(letters)
    np.testing.assert_allclose(np.linalg.norm(output.embedding, axis=1), 1, atol=1e-5)


def test_any_order_of_distinct_letters_is_a_set():
    sets = ["".join(p) for n in (1, 2, 3, 4) for p in itertools.permutations("SMGR", n)]
    assert len(sets) == 64
    for letters in sets[::7]:
        model, variables, images = tiny(descriptors=letters)
        assert set(variables["params"]) >= {f"fc_{letter}" for letter in letters}


def test_it_is_the_functions_put_together():
    model, variables, images = tiny(descriptors="GMS")
    params, stats = variables["params"], variables["batch_stats"]
    output = apply(model, variables, images, True)
    features = model.backbone.apply(
        {"params": params["backbone"], "batch_stats": stats["backbone"]}, images
    )
    descriptors = [pooling.gem(features), pooling.mac(features), pooling.spoc(features)]
    for ours, expected in zip(output.descriptors, descriptors, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
    kernels = [params["fc_G"], params["fc_M"], params["fc_S"]]
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
    model, variables, images = tiny(descriptors="SG", combination=how)
    output = apply(model, variables, images)
    assert output.embedding.shape == (3, 24) and len(output.ranked) == branches
    assert output.descriptors is None


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


def test_fixed_p_changes_the_descriptor():
    embeddings = []
    for p in (1.0, 3.0):
        model, variables, images = tiny(descriptors="G", gem_p=p)
        embeddings.append(apply(model, variables, images).embedding)
    assert np.abs(embeddings[0] - embeddings[1]).max() > 1e-3


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
    output = apply(model, variables, images)
    assert output.embedding.dtype == output.logits.dtype == jnp.float32


def test_the_papers_network_has_the_size_of_its_re_implementation():
    config = base.get_config().model
    model = create_model(config, num_classes=98)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    parameters = sum(a.size for a in jax.tree.leaves(variables["params"]))
    # 26.86 M in the PyTorch re-implementation for 98 classes.
    assert round(parameters / 1e6, 2) == 26.86
    output = jax.eval_shape(model.apply, variables, images)
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


def test_an_efficientnet_is_a_backbone():
    config = base.get_config().model
    config.update(backbone="efficientnet_lite0", embedding_dim=8)
    model = create_model(config, 3)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    output, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert output.embedding.shape == (1, 8)
    assert variables["params"]["fc_S"].shape == (1280, 4)


@pytest.mark.parametrize("combination_, shape", [("concat", (1280, 4)), ("sum", (1280, 1500))])
def test_fc_layers_begin_with_orthogonal_columns_or_rows(combination_, shape):
    config = base.get_config().model
    dim = shape[1] * (2 if combination_ == "concat" else 1)
    config.update(backbone="efficientnet_lite0", embedding_dim=dim, combination=combination_)

    def first_kernel(fc_init):
        config.fc_init = fc_init
        descriptors = [jnp.zeros((2, 1280))] * 2
        variables = create_model(config, 3).init(jax.random.key(0), None, descriptors=descriptors)
        assert variables["params"]["fc_G"].shape == shape
        return variables["params"]["fc_G"]

    kernel = first_kernel("orthogonal")
    gram = kernel.T @ kernel if shape[1] < shape[0] else kernel @ kernel.T
    np.testing.assert_allclose(gram, np.eye(min(shape)), atol=1e-4)
    drawn = first_kernel("lecun_normal")
    assert abs(np.std(drawn) * 1280**0.5 - 1) < 0.1
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
    output, updates = model.apply(
        variables, images, True, return_descriptors=True, mutable=["batch_stats"]
    )
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
