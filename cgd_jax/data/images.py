"""Images as people have them: files, their bytes, images of Pillow, arrays, one or many.

An array of an image is [H, W, 3], of whole numbers from 0 to 255, NumPy's, JAX's or PyTorch's.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cgd_jax.data.decode import decode, resize, to_rgb
from cgd_jax.runtime.errors import InputError

__all__ = ["Box", "clip", "cut", "is_one", "listed", "load", "naming", "read_image"]

AN_IMAGE = (
    "An image is a file, an image of Pillow, or an array [H, W, 3] of whole numbers from 0 to 255; "
    "several are a list of these, or an array [B, H, W, 3]."
)
# (x0, y0, x1, y1) in pixels of the image as displayed.
Box = tuple[float, float, float, float]


def is_one(images: Any) -> bool:
    """Returns whether this is one image, rather than a list or a batch of them."""
    one = isinstance(images, str | os.PathLike | bytes | Image.Image)
    return one or getattr(images, "ndim", 0) == 3


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
      ValueError: the bytes are none; the message is the reason in a few words.
    """
    with naming(image):
        return cut(load(image), size)


def load(image: Any) -> bytes | np.ndarray:
    """Returns what there is of an image: the bytes of a file, or pixels [H, W, 3] uint8.

    Raises:
      OSError: the file cannot be read.
      InputError: it is no image.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    if isinstance(image, Image.Image):
        return to_rgb(image)
    array = _as_array(image)
    found = f"an array of shape {array.shape} and dtype {array.dtype}"
    if array.dtype.kind in "iuf" and array.size:
        low, high = array.min(), array.max()
        is_image = array.ndim == 3 and array.shape[2] == 3 and array.dtype.kind != "f"
        if is_image and low >= 0 and high <= 255:
            return array.astype(np.uint8, copy=False)
        found += f" with values from {low} to {high}"
    hint = ""
    if array.dtype.kind == "f":
        hint = " Of floats from 0 to 1 make (255 * image).round().astype('uint8')."
    elif array.ndim == 3 and array.shape[0] == 3:
        hint = " The channels stand last: np.moveaxis(image, 0, -1)."
    raise InputError(f"Got {found}. {AN_IMAGE}{hint}")


def cut(content: bytes | np.ndarray, size: int, box: Box | None = None) -> np.ndarray:
    """Cuts a box out of what `load` returned, and resizes it: [size, size, 3] uint8."""
    if isinstance(content, bytes):
        return decode(content, box, size)
    x0, y0, x1, y1 = clip(box, *content.shape[:2])
    return resize(content[y0:y1, x0:x1], size)


def clip(box: Box | None, height: int, width: int) -> tuple[int, int, int, int]:
    """Returns the whole pixels of an image that a box touches; without a box, all."""
    x0, y0, x1, y1 = box or (0, 0, width, height)
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    if not (x1 > x0 and y1 > y0):
        raise ValueError(f"empty box {box} in an image of {width}x{height} pixels")
    return math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)


@contextlib.contextmanager
def naming(image: Any) -> Iterator[None]:
    """Puts the name of a file before what is wrong with it."""
    try:
        yield
    except (OSError, ValueError) as error:
        if not isinstance(image, str | os.PathLike):
            raise
        if isinstance(error, OSError):
            raise type(error)(f"{image}: {error.strerror or error}.") from error
        raise InputError(f"{image}: {error}.") from error


def _as_array(images: Any) -> np.ndarray:
    return np.asarray(images.detach().cpu() if hasattr(images, "detach") else images)  # PyTorch's
