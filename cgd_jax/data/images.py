"""Images as people have them: files, their bytes, images of Pillow, arrays, one or many.

An array of an image is [H, W, 3], of whole numbers from 0 to 255, NumPy's, JAX's or PyTorch's.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from cgd_jax.data.decode import (
    Box,
    Decoded,
    clip,
    decode_at_least,
    dimensions,
    read_file,
    resize,
    to_rgb,
)
from cgd_jax.data.shapes import Shape, Size, nearest
from cgd_jax.runtime.errors import InputError

AN_IMAGE = (
    "An image is a file, an image of Pillow, or an array [H, W, 3] of whole numbers from 0 to 255; "
    "several are a list of these, or an array [B, H, W, 3]."
)


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


def read_image(image: Any, size: Size) -> np.ndarray:
    """Reads one image, and resizes it as those of the data sets are: [size, size, 3] uint8.

    Of several shapes it gets the nearest. Raises FileNotFoundError; InputError if it is no image,
    and ValueError, with the reason in a few words, if bytes are none.
    """
    with naming(image):
        return cut(load(image), size)


def load(image: Any) -> bytes | np.ndarray:
    """Returns what there is of an image: the bytes of a file, or pixels [H, W, 3] uint8.

    Raises OSError, ValueError for a pipe, a device or what is too large, InputError for no image.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        return read_file(image)
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


def at_least(content: bytes | np.ndarray, size: int | Shape, box: Box | None = None) -> Decoded:
    """Decodes and cuts what `load` returned once, as `decode_at_least` does."""
    if isinstance(content, bytes):
        return decode_at_least(content, size, box)
    height, width = content.shape[:2]
    x0, y0, x1, y1 = clip(box, height, width)
    return Decoded(content[y0:y1, x0:x1], height, width)


def cut(content: bytes | np.ndarray, size: Size, box: Box | None = None) -> np.ndarray:
    """Cuts a box out of what `load` returned, and resizes it as `read_image` does."""
    shape = size if isinstance(size, int) else nearest(size, *extent(content, box))
    return resize(at_least(content, shape, box).pixels, shape)


def extent(content: bytes | np.ndarray, box: Box | None = None) -> Shape:
    """Returns height and width of what `load` returned as displayed, or of a box in it."""
    size = dimensions(content) if isinstance(content, bytes) else content.shape[:2]
    x0, y0, x1, y1 = clip(box, *size)
    return y1 - y0, x1 - x0


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
