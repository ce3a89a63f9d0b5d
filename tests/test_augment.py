"""Augmentation: crops are crops, flips are flips, and a key decides which."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from cgd_jax.augment import MEAN, STD, augment, normalize, random_crop, random_flip


def images_of(batch=32, size=12, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (batch, size, size, 3)).astype(np.uint8)


def positions(image, crop):
    """All places at which a crop stands in an image."""
    size = crop.shape[0]
    return [
        (i, j)
        for i in range(image.shape[0] - size + 1)
        for j in range(image.shape[1] - size + 1)
        if np.array_equal(image[i : i + size, j : j + size], crop)
    ]


def test_crops_are_parts_of_their_images_at_different_places():
    images = images_of()
    crops = np.asarray(random_crop(jax.random.key(0), jnp.asarray(images), 8))
    found = [positions(image, crop) for image, crop in zip(images, crops, strict=True)]
    assert all(len(places) == 1 for places in found)
    places = {places[0] for places in found}
    assert len(places) > 10
    assert {i for i, _ in places} == {j for _, j in places} == set(range(5)), "both ends included"


def test_padding_repeats_the_edge():
    images = images_of()
    crops = np.asarray(random_crop(jax.random.key(0), jnp.asarray(images), 12, pad=2))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    assert all(positions(image, crop) for image, crop in zip(padded, crops, strict=True))
    assert not np.array_equal(crops, images)


def test_flips_mirror_about_half_of_the_images():
    images = images_of(200, 4)
    flipped = np.asarray(random_flip(jax.random.key(0), jnp.asarray(images)))
    mirrored = [np.array_equal(f, i[:, ::-1]) for f, i in zip(flipped, images, strict=True)]
    same = [np.array_equal(f, i) for f, i in zip(flipped, images, strict=True)]
    assert all(np.logical_xor(mirrored, same)) and 70 < sum(mirrored) < 130


def test_normalize_against_numpy():
    images = images_of(2)
    expected = (images / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(normalize(jnp.asarray(images)), expected, atol=1e-5)


def test_augment_follows_config_and_key():
    images = jnp.asarray(images_of(8))
    plain = ConfigDict({"pad": 0, "flip": False})
    np.testing.assert_array_equal(augment(jax.random.key(0), images, plain, 12), normalize(images))
    config = ConfigDict({"pad": 0, "flip": True})
    first, again, other = (augment(jax.random.key(k), images, config, 8) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0


def test_crop_larger_than_the_image():
    with pytest.raises(ValueError, match="16 × 16.*12 × 12"):
        random_crop(jax.random.key(0), jnp.zeros((1, 12, 12, 3)), 16)
