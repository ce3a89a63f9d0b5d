"""Images as people have them: files, images of Pillow, arrays, one or many.

An array of an image is [H, W, 3], of whole numbers from 0 to 255, NumPy's, JAX's or PyTorch's.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cgd_jax.data.decode import decode, resize, to_rgb
from cgd_jax.runtime.errors import InputError

__all__ = ["is_one", "listed", "read_image"]

AN_IMAGE = (
    "An image is a file, an image of Pillow, or an array [H, W, 3] of whole numbers from 0 to 255; "
    "several are a list of these, or an array [B, H, W, 3]."
)


def is_one(images: Any) -> bool:
    """Returns whether this is one image, rather than a list or a batch of them."""
    return isinstance(images, str | os.PathLike | Image.Image) or getattr(images, "ndim", 0) == 3


def listed(images: Any) -> list | np.ndarray:
    """Returns one image, a list, an iterator or a batch [B, H, W, 3] as what can be sliced."""
    if is_one(images):
        return [images]
    if isinstance(images, list | tuple | Iterator):
        return list(images)
    array = _as_array(images)
    return array if array.ndim == 4 else [array]


def read_image(image: Any, size: int) -> np.ndarray:
    """Reads one image, and resizes it as those of the data sets are.

    Returns:
      [size, size, 3] uint8.

    Raises:
      FileNotFoundError: there is no such file.
      InputError: it is no image.
    """
    if isinstance(image, str | os.PathLike):
        try:
            return decode(Path(image).read_bytes(), size=size)
        except OSError as error:
            raise type(error)(f"{image}: {error.strerror or error}.") from error
        except ValueError as error:
            raise InputError(f"{image}: {error}.") from error
    if isinstance(image, Image.Image):
        return resize(to_rgb(image), size)
    array = _as_array(image)
    found = f"an array of shape {array.shape} and dtype {array.dtype}"
    if array.dtype.kind in "iuf" and array.size:
        low, high = array.min(), array.max()
        is_image = array.ndim == 3 and array.shape[2] == 3 and array.dtype.kind != "f"
        if is_image and low >= 0 and high <= 255:
            return resize(array.astype(np.uint8), size)
        found += f" with values from {low} to {high}"
    hint = ""
    if array.dtype.kind == "f":
        hint = " Of floats from 0 to 1 make (255 * image).round().astype('uint8')."
    elif array.ndim == 3 and array.shape[0] == 3:
        hint = " The channels stand last: np.moveaxis(image, 0, -1)."
    raise InputError(f"Got {found}. {AN_IMAGE}{hint}")


def _as_array(images: Any) -> np.ndarray:
    return np.asarray(images.detach().cpu() if hasattr(images, "detach") else images)  # PyTorch's
