"""Augmentation: crops are crops, flips are flips, and a key decides which."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgd_jax.augment import (
    augment,
    color_jitter,
    random_crop,
    random_erase,
    random_flip,
    random_resized_crop,
)
from cgd_jax.preprocess import IMAGENET, normalize
from configs import base


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


def test_resized_crops_of_a_ramp_are_ramps_of_their_part():
    """On an image whose value is its column, a crop's slope is its width."""
    ramp = np.broadcast_to(np.arange(64.0)[None, None, :, None], (100, 64, 64, 1))
    crops = np.asarray(random_resized_crop(jax.random.key(0), jnp.asarray(ramp), 32, 0.25))
    assert crops.shape == (100, 32, 32, 1)
    np.testing.assert_allclose(crops - crops[:, :1], 0, atol=1e-3)  # the same in every row
    slopes = (crops[:, 0, 24, 0] - crops[:, 0, 8, 0]) / 16
    widths = slopes * 32 / 64  # as shares of the image
    assert 0.4 < widths.min() < 0.6 and 0.9 < widths.max() <= 1.001
    assert crops.min() >= 0 and crops.max() <= 63
    whole = random_resized_crop(jax.random.key(0), jnp.asarray(ramp), 32, 1.0)
    assert np.asarray(whole).mean() == pytest.approx(31.5, abs=2)


def test_jitter_changes_what_it_says_and_nothing_at_strength_zero():
    images = jnp.asarray(images_of(50, 6))
    np.testing.assert_allclose(color_jitter(jax.random.key(0), images, 0.0), images, atol=1e-3)
    flat = jnp.full((400, 4, 4, 3), 100, jnp.uint8)
    brightness = np.asarray(color_jitter(jax.random.key(0), flat, 0.3))
    # No contrast and no colour to change: brightness alone.
    np.testing.assert_allclose(
        brightness, brightness[:, :1, :1, :1] * np.ones((4, 4, 3)), rtol=1e-4
    )
    factors = brightness[:, 0, 0, 0] / 100
    assert 0.69 < factors.min() < 0.72 and 1.28 < factors.max() < 1.31
    jittered = np.asarray(color_jitter(jax.random.key(1), images, 0.9))
    assert jittered.min() >= 0 and jittered.max() <= 255


def test_erasing_sets_rectangles_to_zero():
    images = jnp.ones((300, 40, 40, 3))
    erased = np.asarray(random_erase(jax.random.key(0), images, 0.5)) == 0
    assert np.all(erased == erased[..., :1])
    touched = erased[..., 0].any((1, 2))
    assert 110 < touched.sum() < 190
    for mask in erased[touched, ..., 0]:
        rows, columns = mask.any(1), mask.any(0)
        assert np.array_equal(mask, rows[:, None] & columns[None])
        for side in (rows, columns):
            assert side.sum() == np.ptp(np.flatnonzero(side)) + 1
        assert 0.005 < mask.mean() < 0.45
    assert not (np.asarray(random_erase(jax.random.key(0), images, 0.0)) == 0).any()


def augment_config(**values):
    config = base.get_config().augment
    config.update(values)
    return config


def test_augment_follows_config_and_key():
    images = jnp.asarray(images_of(8))
    plain = augment_config(flip=False)
    np.testing.assert_array_equal(
        augment(jax.random.key(0), images, plain, 12, IMAGENET), normalize(images, IMAGENET)
    )
    first, again, other = (
        augment(jax.random.key(k), images, augment_config(), 8, IMAGENET) for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0


@pytest.mark.parametrize(
    "option", [{"pad": 2}, {"flip": True}, {"min_area": 0.5}, {"jitter": 0.5}, {"erase": 1.0}]
)
def test_every_option_does_something(option):
    images = jnp.asarray(images_of(8))
    plain, changed = (
        augment(jax.random.key(0), images, augment_config(**{"flip": False, **more}), 12, IMAGENET)
        for more in ({}, option)
    )
    assert changed.shape == plain.shape and np.abs(changed - plain).max() > 0.1


def test_crop_larger_than_the_image():
    with pytest.raises(ValueError, match="16 × 16.*12 × 12"):
        random_crop(jax.random.key(0), jnp.zeros((1, 12, 12, 3)), 16)
