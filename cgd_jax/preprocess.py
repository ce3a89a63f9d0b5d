"""From uint8 images to what a network expects: the middle cut out, pixels normalized."""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Images = TypeVar("Images", np.ndarray, jax.Array)


class Normalization(NamedTuple):
    """What a network expects of pixels scaled to [0, 1]: (pixel - mean) / std.

    It belongs to the weights, and is kept with them.
    """

    mean: np.ndarray  # [3] float32: red, green, blue
    std: np.ndarray  # [3] float32

    @classmethod
    def of(cls, mean, std) -> "Normalization":
        """From two sequences of three numbers, or two numbers."""
        mean, std = (np.broadcast_to(np.float32(value), 3).copy() for value in (mean, std))
        return cls(mean, std)


IMAGENET = Normalization.of((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
EFFICIENTNET_LITE = Normalization.of(127 / 255, 128 / 255)


def normalize(images: jax.Array, normalization: Normalization) -> jax.Array:
    """Scales pixels [..., 3] from 0 to 255 as a network expects them, in float32."""
    return (images.astype(jnp.float32) / 255.0 - normalization.mean) / normalization.std


def center_crop(images: Images, size: int) -> Images:
    """Cuts the middle out: [B, H, W, C] → [B, size, size, C]; ValueError if they are smaller."""
    if len(images.shape) != 4 or min(images.shape[1:3]) < size:
        raise ValueError(
            f"cannot cut {size} × {size} pixels out of the middle of {tuple(images.shape)}; "
            f"[B, H, W, C] with H and W of at least {size} is needed."
        )
    top, left = ((side - size) // 2 for side in images.shape[1:3])
    return images[:, top : top + size, left : left + size]
