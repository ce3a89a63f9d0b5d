"""Encoded image bytes → RGB pixels of one size, the same way for training and for test.

JPEGs go through libjpeg-turbo (simplejpeg), which can decode straight to a half,
a quarter or an eighth of the size; everything unusual (CMYK, an EXIF rotation, 16 bits, a
palette, transparency, other formats) through Pillow. OpenCV resizes. All three release
the GIL, so that threads use all cores.

Resizing averages when it shrinks (every source pixel counts, nothing aliases) and
interpolates linearly when it enlarges; the aspect ratio is not kept. Pillow's bilinear
filter, which followers of the paper use, averages a somewhat wider window:
`benchmarks/decoding.py` measures the difference, in the mean one grey level of 255 or less
on most photos and two on very detailed ones.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterator

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from cgd_jax.runtime.files import describe_impostor

with contextlib.suppress(ImportError):  # for HEIC
    import pillow_heif

    pillow_heif.register_heif_opener()

# The caller decodes many images at once; threads inside of one resize would only compete.
cv2.setNumThreads(1)

# Ways of decoding a JPEG smaller. Libjpeg-turbo knows all eighths, but those between are
# neither as fast nor as close to a resized whole image.
REDUCTIONS = (1, 2, 4, 8)
# Pillow's own limit for decompression bombs: a quarter of a GiB of RGB.
MAX_PIXELS = 89_478_485

ORIENTATION = 0x0112  # the EXIF tag

# Pillow knows other formats: icons, films, what it only recognizes, and EPS, for which it starts
# Ghostscript.
PHOTO_FORMATS = "JPEG PNG WEBP GIF BMP DIB TIFF AVIF HEIF JPEG2000 PPM TGA QOI PSD PCX SGI ICO"
Image.init()
FORMATS: list[str] = [name for name in PHOTO_FORMATS.split() if name in Image.OPEN]
HEIF_ENDINGS = {".heic", ".heics", ".heif", ".heifs", ".hif"}
# Of files that are taken for images, in lower case.
ENDINGS = HEIF_ENDINGS | {end for end, name in Image.EXTENSION.items() if name in FORMATS}

# Images whose brightest value is below this are black to the eye, and to a network.
BLACK = 16
# Images of something have a contrast above this; JPEGs of one colour vary by one or two.
PLAIN = 3


def decode(
    data: bytes,
    bbox: tuple[float, float, float, float] | None = None,
    size: int | None = None,
) -> np.ndarray:
    """Decodes an image, cuts out a box and resizes it to a square.

    Args:
      data: the bytes of a JPEG, PNG, WebP, BMP or any other file that Pillow reads.
      bbox: (x0, y0, x1, y1) in pixels of the image as displayed, that is after its EXIF
        rotation; clipped to the image, and widened to whole pixels.
      size: side in pixels of the square that comes back; None keeps what there is.

    Returns:
      uint8 [size, size, 3], RGB; [H, W, 3] without `size`. Transparency is laid on white,
      16 bits are scaled to 8, the first frame stands for an animation.

    Raises:
      ValueError: not a readable, whole image of at most `MAX_PIXELS`, or an empty box.
        The message is the reason in a few words.
    """
    height, width, plain = _header(data)
    x0, y0, x1, y1 = box = (0, 0, width, height) if bbox is None else tuple(map(float, bbox))
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    if not (x1 > x0 and y1 > y0):
        raise ValueError(f"empty box {box} in an image of {width}x{height} pixels")
    # In the reduced image the box still has at least size x size pixels.
    largest = 1 if size is None else min(y1 - y0, x1 - x0) / size
    reduction = max(r for r in REDUCTIONS if r <= max(largest, 1))
    image = _read(data, height, width, plain, reduction)
    if bbox is not None:
        down, across = image.shape[0] / height, image.shape[1] / width
        image = image[
            math.floor(y0 * down) : math.ceil(y1 * down),
            math.floor(x0 * across) : math.ceil(x1 * across),
        ]
    return image if size is None else resize(image, size)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes uint8 [H, W, 3] to [size, size, 3] without aliasing."""
    factor = max(image.shape[:2]) / size
    if factor <= 4 / 3:  # Enlarged, or so little smaller that every pixel still counts.
        return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
    if factor <= 4:  # Twice too large, then 2x2 means: exact areas take two to three times as long.
        image = cv2.resize(image, (2 * size, 2 * size), interpolation=cv2.INTER_LINEAR)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)


def check(data: bytes) -> tuple[int, int, bool]:
    """Reads an image to its end without keeping it; as cheap as that can be.

    Returns:
      (height, width) in pixels, as displayed, and whether it is blank: nearly black, or of
      one colour.

    Raises:
      ValueError: the reason why it cannot be used, in a few words.
    """
    height, width, plain = _header(data)
    # All bits are read, few pixels computed.
    image = _read(data, height, width, plain, max(REDUCTIONS))
    high, low = image.max((0, 1)), image.min((0, 1))
    return height, width, bool(high.max() < BLACK or np.all(high - low < PLAIN))


def dimensions(data: bytes) -> tuple[int, int]:
    """Reads (height, width) in pixels, as displayed, from an image's header.

    Raises:
      ValueError: the reason why it cannot be used, in a few words.
    """
    height, width, _ = _header(data)
    return height, width


def looks_like_image(path: str | os.PathLike) -> bool:
    """Returns whether a file is taken for an image: by its ending, else by its first bytes."""
    name = os.fspath(path).lower()
    if os.path.splitext(name)[1] in ENDINGS:
        return True
    try:
        if not os.path.isfile(path):  # Opening a pipe would wait for ever.
            return False
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError:
        return False
    return head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8")) or (
        head[:4] == b"RIFF" and head[8:] == b"WEBP"
    )


def _read(data: bytes, height: int, width: int, plain: bool, reduction: int) -> np.ndarray:
    if plain:
        least = {"min_height": -(-height // reduction), "min_width": -(-width // reduction)}
        try:
            return simplejpeg.decode_jpeg(data, "RGB", **least)
        except ValueError:  # Damaged, or merely odd: Pillow knows the difference.
            pass
    with _opened(data) as image:
        # Reduces a JPEG; nothing happens for other formats.
        image.draft(None, (max(image.width // reduction, 1), max(image.height // reduction, 1)))
        return to_rgb(image)


def _header(data: bytes) -> tuple[int, int, bool]:
    """Returns height and width as displayed, and whether it is a JPEG without peculiarities."""
    if not data:
        raise ValueError("empty file")
    # Without an EXIF block there is no rotation and no need for Pillow, whose header
    # parsing takes longer than everything else here.
    if data[:2] == b"\xff\xd8" and b"Exif\0\0" not in data[:65536]:
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            pass
        else:
            _check_size(height, width)
            return height, width, colorspace in ("YCbCr", "Gray", "RGB")
    with _opened(data) as image:
        width, height = image.size
        plain = image.format == "JPEG" and image.mode in ("RGB", "L")
        try:
            rotation = image.getexif().get(ORIENTATION, 1)
        except Exception:  # A broken EXIF block does not make the image unreadable.
            rotation = 1
        if rotation in (5, 6, 7, 8):
            height, width = width, height
        return height, width, plain and rotation not in range(2, 9)


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"{width}x{height} pixels are more than {MAX_PIXELS:,} (a decompression bomb?)"
        )


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Opens an image with Pillow; whatever is wrong with it in the block is a ValueError."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.height, image.width)
            yield image
    except Exception as error:  # Pillow's plugins raise nearly anything on broken files.
        raise ValueError(_reason(error, data)) from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """Turns an image of Pillow as its EXIF says, in any mode, into uint8 [H, W, 3].

    Raises:
      ValueError: it holds numbers of a range that cannot be shown. Damaged files raise nearly
        anything.
    """
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # more than 8 bits, which Pillow would clip
        return np.repeat(_eight_bits(np.asarray(image))[..., None], 3, axis=-1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    """Scales 16 bits, or floating-point values from 0 to 1, to uint8 [H, W].

    Raises:
      ValueError: numbers of another range.
    """
    low, high = grey.min(), grey.max()
    if np.issubdtype(grey.dtype, np.floating):
        if low >= 0 and high <= 255:  # false for NaN
            return np.rint(grey * (255 if high <= 1 else 1)).astype(np.uint8)
        meant = "0 to 1 or 0 to 255"
    else:
        if low >= 0 and high <= 65535:
            return (grey.astype(np.int64) >> 8).astype(np.uint8)
        meant = "0 to 65,535"
    raise ValueError(f"holds values from {low:,} to {high:,}; {meant} can be shown")


def _reason(error: Exception, data: bytes) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        if impostor := describe_impostor(data):
            return f"{impostor}, not an image"
        if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
            return "a HEIC image: pip install pillow-heif to read it"
        if data[4:12] == b"ftypavif":
            return "an AVIF image: pip install -U pillow to read it"
        return "not an image, or damaged at its beginning"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS:,} pixels (a decompression bomb?)"
    return f"{error}" or type(error).__name__
