"""Attributions: the parts add up to the similarity, and point at what two images share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cgd_jax import attribution, combination, pooling
from cgd_jax.models import cgd
from cgd_jax.models.cgd import CGD
from cgd_jax.models.resnet import ResNet
from cgd_jax.preprocess import IMAGENET, Normalization
from cgd_jax.runtime.errors import InputError
from tests import quick
from tests.variables import random_variables


@pytest.mark.parametrize("letter", quick.first(attribution.MAPS, 2))
@pytest.mark.parametrize("ties", [False, True])
def test_a_pooled_map_adds_up_to_the_descriptor(letter, ties):
    rng = np.random.default_rng(0)
    features = np.maximum(rng.normal(size=(5, 7, 12)), 0).astype(np.float32)
    if ties:
        features = np.round(features)
    features[..., 0] = 0  # a dead channel
    found = jax.jit(attribution.pooled_map, static_argnums=0)(letter, features)
    assert found.shape == features.shape and found.dtype == jnp.float32
    np.testing.assert_allclose(found.sum((0, 1)), pooling.POOLINGS[letter](features), atol=1e-5)
    assert np.all(found >= 0)
    if letter != "R":  # whose lengths would have to be held constant
        # Euler: feature times derivative.
        gradient = jax.jit(jax.grad(lambda f: pooling.POOLINGS[letter](f).sum()))(features)
        np.testing.assert_allclose(found, features * gradient, atol=2e-6)


def test_pooled_maps_of_other_exponents():
    features = jnp.asarray(np.random.default_rng(0).uniform(0, 2, (4, 4, 3)), jnp.float32)
    gem = jax.jit(lambda p: attribution.pooled_map("G", features, p))
    np.testing.assert_allclose(gem(1.0), attribution.pooled_map("S", features), rtol=1e-5)
    p = jnp.array([1.0, 3.0, 7.0])
    np.testing.assert_allclose(gem(p).sum((0, 1)), pooling.gem(features, p), rtol=1e-5)
    np.testing.assert_allclose(gem(2000.0), attribution.pooled_map("M", features), atol=2e-2)
    with pytest.raises(InputError, match="no map for X, which is .*; S, M, G, R are"):
        attribution.pooled_map("X", features)


@pytest.mark.parametrize("how", quick.first(combination.COMBINATIONS))
def test_contributions_add_up_to_the_similarity(how):
    rng, letters = np.random.default_rng(1), "SMGR"
    features = rng.exponential(size=(2, 4, 6, 8)).astype(np.float32)
    shapes = combination.kernel_shapes(8, len(letters), 12, how)
    kernels = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    descriptors = [pooling.POOLINGS[letter](features) for letter in letters]
    embedding, _ = combination.combine(descriptors, kernels, how)
    contributions = jax.jit(attribution.contributions, static_argnums=(2, 3))
    maps = contributions(features, kernels, letters, how, reference=np.zeros(12, np.float32))
    assert maps.shape == (2, len(letters), 4, 6)
    similarity = embedding[0] @ embedding[1]
    np.testing.assert_allclose(maps.sum((1, 2, 3)), similarity, atol=1e-5)
    if how in ("concat", "separate"):
        parts = np.split(embedding[0] * embedding[1], len(letters))
        expected = [part.sum() for part in parts]
        np.testing.assert_allclose(maps.sum((2, 3)), [expected, expected], atol=1e-5)
    mean = rng.normal(size=12).astype(np.float32)
    maps = contributions(features, kernels, letters, how, reference=mean)
    np.testing.assert_allclose(maps.sum((1, 2, 3)), similarity - embedding @ mean, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"descriptors": "GMRS", "learn_p": "channel", "gem_p": 2.5, "center": "direction"},
        {"descriptors": "SG", "combination": "raw", "learn_p": "scalar", "center": "mean"},
    ],
)
def test_the_explanation_is_of_what_the_network_computes(options):
    backbone = ResNet(stage_sizes=(1,), bottleneck=False, width=4, stem="3x3")
    model = CGD(backbone, 7, embedding_dim=24, **options)
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    variables = random_variables(model, jnp.zeros((2, 16, 16, 3)))
    normalization = Normalization.of(0.5, 0.25)
    embed = cgd.embed_model(model, variables, normalization, 16)
    expected = np.asarray(embed(images))
    nothing = np.zeros(24, np.float32)
    found = attribution.explain_pair(model, variables, normalization, images, 16, nothing)
    assert found.maps.shape == (2, len(model.descriptors), 8, 8)
    np.testing.assert_allclose(found.similarity, expected[0] @ expected[1], atol=1e-5)
    np.testing.assert_allclose(found.maps.sum((1, 2, 3)), found.similarity, atol=1e-4)
    assert found.common == 0 and abs(found.remainder) < 1e-4
    reference = np.full(24, 0.1, np.float32)
    found = attribution.explain_pair(model, variables, normalization, images, 16, reference)
    np.testing.assert_allclose(found.common, expected.mean(0) @ reference, atol=1e-5)
    np.testing.assert_allclose(
        found.shares.sum() + found.common, expected[0] @ expected[1], atol=1e-4
    )


def test_every_vector_is_explained():
    """Of a network with centering, which descriptors alone are without."""
    backbone = ResNet(stage_sizes=(1,), bottleneck=False, width=4, stem="3x3")
    model = CGD(backbone, 3, "GM", 8, learn_p="scalar", center="direction")
    variables = random_variables(model, jnp.zeros((2, 16, 16, 3)))
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    for vector in ("descriptors", "first_descriptor", "descriptor_M", "branch_M"):
        assert not attribution.why_no_map("GM", vector)
        a, b = cgd.embed_model(model, variables, IMAGENET, 16, vector)(images)
        found = attribution.explain_pair(
            model, variables, IMAGENET, images, 16, reference=0.1, vector=vector
        )
        assert found.maps.shape[1] == (2 if vector == "descriptors" else 1)
        np.testing.assert_allclose(found.similarity, a @ b, atol=1e-5)
        np.testing.assert_allclose(
            found.maps.sum((1, 2, 3)), [a @ (b - 0.1), b @ (a - 0.1)], atol=1e-4
        )


class Patches(nn.Module):
    """A backbone that sees its own cell only: the mean colour of 4 × 4 pixels."""

    @nn.compact
    def __call__(self, images, train):
        return nn.avg_pool(images, (4, 4), (4, 4))


@pytest.mark.parametrize("letter", attribution.MAPS)
def test_the_map_peaks_where_the_shared_object_lies(letter):
    images = np.zeros((2, 16, 24, 3), np.uint8)
    images[0, 4:8, 16:20, 0] = 255  # both have something red,
    images[1, 12:16, 0:4, 0] = 255
    images[0, 8:12, 4:8, 1] = 255  # only one green,
    images[1, 0:4, 8:12, 2] = 255  # only the other blue
    model = CGD(Patches(), 1, descriptors=letter, embedding_dim=3)
    variables = random_variables(model, jnp.zeros((2, 16, 24, 3)))
    variables["params"][f"fc_{letter}"] = np.eye(3, dtype=np.float32)
    output, captured = model.apply(
        variables, images / 255, capture_intermediates=lambda module, _: module.name == "backbone"
    )
    (features,) = captured["intermediates"]["backbone"]["__call__"]
    kernels = [variables["params"][f"fc_{letter}"]]
    maps = jax.jit(attribution.contributions, static_argnums=2)(features, kernels, letter)[:, 0]
    assert maps.shape == (2, 4, 6)
    for i, place in enumerate([(1, 4), (3, 0)]):
        assert np.unravel_index(maps[i].argmax(), maps[i].shape) == place
        others = np.delete(maps[i].ravel(), maps[i].argmax())
        np.testing.assert_allclose(others, 0, atol=1e-5)
    np.testing.assert_allclose(maps[0].max(), output.embedding[0] @ output.embedding[1], atol=1e-5)
