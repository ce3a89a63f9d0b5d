"""What happens to a batch of uint8 images on the device, inside the jitted step."""

import jax
import jax.numpy as jnp

# Of ImageNet, in units of a full-scale pixel: red, green, blue.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalize(images: jax.Array, mean=MEAN, std=STD) -> jax.Array:
    """Scales pixels as ImageNet networks expect them.

    Args:
      images: [..., 3] uint8.
      mean: three numbers between 0 and 1.
      std: three numbers between 0 and 1.

    Returns:
      Same shape, float32.
    """
    return (images.astype(jnp.float32) / 255.0 - jnp.asarray(mean)) / jnp.asarray(std)


def random_crop(key: jax.Array, images: jax.Array, size: int, pad: int = 0) -> jax.Array:
    """Cuts a square out of every image, each at a place of its own.

    Args:
      key: random key.
      images: [B, H, W, C].
      size: side of the square, in pixels.
      pad: pixels by which every image is first enlarged on every side, repeating
        its edge.

    Returns:
      [B, size, size, C], the dtype of `images`.

    Raises:
      ValueError: the padded images are smaller than the square.
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
    """Mirrors each image left to right with probability one half. [B, H, W, C] → same."""
    mirrored = jax.random.bernoulli(key, 0.5, (len(images),))
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def augment(key: jax.Array, images: jax.Array, config, size: int) -> jax.Array:
    """Everything that a config asks for, in order; the result is normalized.

    Args:
      key: random key; the same key and images give the same batch.
      images: [B, H, W, 3] uint8.
      config: the `augment` part of an experiment's config.
      size: side of what the network sees, in pixels.

    Returns:
      [B, size, size, 3] float32.
    """
    crop_key, flip_key = jax.random.split(key)
    images = random_crop(crop_key, images, size, config.pad)
    if config.flip:
        images = random_flip(flip_key, images)
    return normalize(images)
