"""What happens to a batch of uint8 images on the device, inside the jitted step.

All take a random key and images [B, H, W, C], and do to every image something of its own.
"""

import jax
import jax.numpy as jnp

from cgd_jax.preprocess import Normalization, normalize


def random_crop(key: jax.Array, images: jax.Array, size: int, pad: int = 0) -> jax.Array:
    """Cuts out a square, [B, size, size, C] in the dtype of the images.

    They are first enlarged by `pad` pixels on every side, repeating the edge. Raises ValueError if
    they are smaller than the square even so.
    """
    if pad:
        images = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
    batch, height, width, channels = images.shape
    if height < size or width < size:
        raise ValueError(
            f"cannot crop {size} × {size} pixels from images of {height} × {width} (padding of "
            f"{pad} included)."
        )
    room = jnp.array([height - size + 1, width - size + 1])
    corners = jax.random.randint(key, (batch, 2), 0, room)

    def crop(image, corner):
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (size, size, channels))

    return jax.vmap(crop)(images, corners)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors left to right with probability one half."""
    mirrored = jax.random.bernoulli(key, 0.5, (len(images),))
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def random_resized_crop(key: jax.Array, images: jax.Array, size: int, min_area: float) -> jax.Array:
    """Cuts out a rectangle and scales it to a square, [B, size, size, C] float32.

    Szegedy et al., https://arxiv.org/abs/1409.4842: its share of the area is drawn evenly between
    `min_area`, in (0, 1], and 1, the aspect ratio between 3:4 and 4:3 on a log scale. A rectangle
    that is longer than the image is cut to it.
    """
    height, width, channels = images.shape[1:]

    def crop(key, image):
        area_key, ratio_key, corner_key = jax.random.split(key, 3)
        area = jax.random.uniform(area_key, minval=min_area)
        log_ratio = jax.random.uniform(ratio_key, minval=-jnp.log(4 / 3), maxval=jnp.log(4 / 3))
        sides = jnp.sqrt(area * jnp.exp(jnp.array([1.0, -1.0]) * log_ratio))
        sides = jnp.minimum(sides, 1.0) * jnp.array([height, width])
        corner = jax.random.uniform(corner_key, (2,)) * (jnp.array([height, width]) - sides)
        scale = size / sides
        shape = (size, size, channels)
        return jax.image.scale_and_translate(
            image, shape, (0, 1), scale, -corner * scale, "linear", antialias=True
        )

    keys = jax.random.split(key, len(images))
    return jax.vmap(crop)(keys, images.astype(jnp.float32))


def color_jitter(key: jax.Array, images: jax.Array, strength: float) -> jax.Array:
    """Changes brightness, contrast and saturation, each by a factor of 1 ± `strength` at most.

    Images, of three channels, have values from 0 to 255; the result is float32, clipped to these.
    """
    factors = jax.random.uniform(
        key, (3, len(images), 1, 1, 1), minval=max(0.0, 1 - strength), maxval=1 + strength
    )
    luma = jnp.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as everybody's jitter has it
    images = jnp.clip(images.astype(jnp.float32) * factors[0], 0, 255)
    gray = jnp.sum(images * luma, -1, keepdims=True).mean((1, 2), keepdims=True)
    images = jnp.clip(gray + (images - gray) * factors[1], 0, 255)
    gray = jnp.sum(images * luma, -1, keepdims=True)
    return jnp.clip(gray + (images - gray) * factors[2], 0, 255)


def random_erase(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Sets a rectangle of some images to zero, which is the mean of normalized ones.

    Zhong et al., https://arxiv.org/abs/1708.04896, with their ranges: 2 to 40 % of the area, aspect
    ratio between 0.3 and 1/0.3. `probability` is that of an image to be touched.
    """
    batch, height, width, _ = images.shape
    keys = jax.random.split(key, 4)
    area = jax.random.uniform(keys[0], (batch, 1, 1), minval=0.02, maxval=0.4)
    limit = jnp.log(0.3)
    ratio = jnp.exp(jax.random.uniform(keys[1], (batch, 1, 1), minval=limit, maxval=-limit))
    tall = jnp.minimum(jnp.sqrt(area * ratio), 1.0) * height
    wide = jnp.minimum(jnp.sqrt(area / ratio), 1.0) * width
    corner = jax.random.uniform(keys[2], (2, batch, 1, 1))
    top, left = corner[0] * (height - tall), corner[1] * (width - wide)
    row, column = jnp.arange(height)[:, None] + 0.5, jnp.arange(width)[None] + 0.5
    inside = (row > top) & (row < top + tall) & (column > left) & (column < left + wide)
    touched = jax.random.bernoulli(keys[3], probability, (batch, 1, 1))
    return jnp.where((inside & touched)[..., None], 0, images)


def augment(
    key: jax.Array, images: jax.Array, config, size: int, normalization: Normalization
) -> jax.Array:
    """Does what the `augment` part of a config asks for: uint8 → normalized [B, size, size, 3]."""
    crop_key, flip_key, jitter_key, erase_key = jax.random.split(key, 4)
    if config.min_area < 1:
        images = random_resized_crop(crop_key, images, size, config.min_area)
    else:
        images = random_crop(crop_key, images, size, config.pad)
    if config.flip:
        images = random_flip(flip_key, images)
    if config.jitter:
        images = color_jitter(jitter_key, images, config.jitter)
    images = normalize(images, normalization)
    if config.erase:
        images = random_erase(erase_key, images, config.erase)
    return images
