"""What every network's input goes through, against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from cgd_jax.preprocess import EFFICIENTNET_LITE, IMAGENET, center_crop, normalize

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3)).astype(np.uint8)


def test_normalize_against_numpy():
    expected = (IMAGES.astype(float) - 127) / 128
    found = normalize(jnp.asarray(IMAGES), EFFICIENTNET_LITE)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    red = (IMAGES[..., 0] / 255 - 0.485) / 0.229
    np.testing.assert_allclose(normalize(jnp.asarray(IMAGES), IMAGENET)[..., 0], red, atol=1e-5)


def test_center_crop():
    np.testing.assert_array_equal(center_crop(IMAGES, 8), IMAGES[:, 2:10, 2:10])
    np.testing.assert_array_equal(center_crop(IMAGES, 12), IMAGES)
    with pytest.raises(ValueError, match=r"13 × 13 pixels out of the middle of \(\d+, 12, 12, 3\)"):
        center_crop(IMAGES, 13)
