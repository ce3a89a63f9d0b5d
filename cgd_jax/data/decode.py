"""Encoded image bytes → RGB pixels of one size, the same way for training and for test.

JPEGs go through libjpeg-turbo (simplejpeg), which can decode straight to a half, a quarter or an
eighth of the size; everything unusual (CMYK, an EXIF rotation, 16 bits, a palette, transparency,
other formats) through Pillow. OpenCV resizes. All three release the GIL, so that threads use all
cores. Colors of another profile than sRGB become those of sRGB.

Resizing averages when it shrinks (every source pixel counts, nothing aliases) and
interpolates linearly when it enlarges, to a square unless a shape is given. Pillow's bilinear
filter, which followers of the paper use, averages a somewhat wider window:
`benchmarks/decoding.py` measures the difference, in the mean one grey level of 255 or less
on most photos and two on very detailed ones.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import warnings
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, TiffImagePlugin

from cgd_jax.data.shapes import Shape, as_shape
from cgd_jax.runtime.errors import InputError
from cgd_jax.runtime.files import describe_impostor, read_regular

with contextlib.suppress(ImportError):  # for HEIC
    import pillow_heif

    pillow_heif.register_heif_opener()


def max_pixels(text: str) -> int:
    """Reads the limit of an image's pixels; InputError if it is none."""
    if re.fullmatch(r"\d+(_\d+)*", text) and int(text):
        return int(text)
    raise InputError(
        f"The environment variable CGD_JAX_MAX_PIXELS={text!r} is no number of pixels. Give a "
        f"whole number above 0, such as 400000000 for images of 400 megapixels, or unset it."
    )


# The caller decodes many images at once; threads inside of one resize would only compete.
cv2.setNumThreads(1)

# Ways of decoding a JPEG smaller. Libjpeg-turbo knows all eighths, but those between are
# neither as fast nor as close to a resized whole image.
REDUCTIONS = (1, 2, 4, 8)
# The limit of every image, also of uploads. Decoding takes 5 to 13 bytes of memory a pixel, 16 of a
# WebP, and 20 of one that has to be turned.
MAX_PIXELS = max_pixels(os.environ.get("CGD_JAX_MAX_PIXELS", "200_000_000"))
TOO_MANY = (
    f"more than {MAX_PIXELS:,} pixels (unless it is a decompression bomb, set CGD_JAX_MAX_PIXELS)"
)
MAX_BYTES = 8 * MAX_PIXELS  # of a file: four channels of 16 bits
# A scan of a JPEG costs time for every pixel, and hardly a byte. Cameras and programs write about
# ten; with this many pixels in all of them, decoding takes five seconds.
MAX_SCANS, SCANNED_PIXELS = 100, 4_000_000_000
BAND_PIXELS = 1 << 20  # converted at a time

# Pillow checks what images hold inside of them, such as those in an icon. It raises at twice this
# number, and warns before.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Of a text or a color profile in a PNG. Programs that generate images write megabytes.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

ORIENTATION = 0x0112  # the EXIF tag
TILE_WIDTH, TILE_LENGTH = 322, 323  # tags of TIFF
# Of a JPEG: all but those without a length, which are stuffed or restart a scan.
MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")
SCAN, END = 0xDA, 0xD9
PNG = b"\x89PNG\r\n\x1a\n"  # how it begins

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

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the image as displayed


def decode(data: bytes, bbox: Box | None = None, size: int | Shape | None = None) -> np.ndarray:
    """Decodes an image, cuts out a box and resizes it: uint8 [H, W, 3] of sRGB; see `resize`.

    The box is clipped to the image and widened to whole pixels. Transparency is laid on white, 16
    bits are scaled to 8, the first frame stands for an animation. Raises ValueError, whose message
    is the reason in a few words: not a whole image of at most `MAX_PIXELS`, or an empty box.
    """
    pixels = decode_at_least(data, size, bbox).pixels
    return pixels if size is None else resize(pixels, size)


class Decoded(NamedTuple):
    """An image, or a part of one, and the size of the whole as displayed."""

    pixels: np.ndarray  # [H, W, 3] uint8 of sRGB
    height: int
    width: int


def decode_at_least(
    data: bytes, size: int | Shape | None = None, box: Box | None = None
) -> Decoded:
    """Decodes and cuts an image once, for `resize` to make every size up to `size` of it.

    A JPEG is reduced as far as no side falls below `size`, so that `resize` to `size` gives what
    `decode` does; without a size, and in other formats, nothing is reduced. Raises as `decode`.
    """
    with _opened(data) as image:
        height, width = _size(image)
        x0, y0, x1, y1 = clip(box, height, width)
        tall, wide = as_shape(size or (y1 - y0, x1 - x0))
        largest = max(min((y1 - y0) / tall, (x1 - x0) / wide), 1)
        pixels = _read(image, data, max(r for r in REDUCTIONS if r <= largest))
    if box is not None:
        down, across = pixels.shape[0] / height, pixels.shape[1] / width
        pixels = pixels[
            math.floor(y0 * down) : math.ceil(y1 * down),
            math.floor(x0 * across) : math.ceil(x1 * across),
        ]
    return Decoded(pixels, height, width)


def clip(box: Box | None, height: int, width: int) -> tuple[int, int, int, int]:
    """Returns the whole pixels of an image that a box touches; ValueError for none."""
    x0, y0, x1, y1 = (0, 0, width, height) if box is None else map(float, box)
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    if not (x1 > x0 and y1 > y0):
        raise ValueError(f"empty box {box} in an image of {width}x{height} pixels")
    return math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)


def resize(image: np.ndarray, size: int | Shape) -> np.ndarray:
    """Resizes uint8 [H, W, 3] to [size, size, 3], or to a shape, without aliasing."""
    height, width = as_shape(size)
    factor = max(image.shape[0] / height, image.shape[1] / width)
    if factor <= 4 / 3:  # Enlarged, or so little smaller that every pixel still counts.
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    if factor <= 4:  # Twice too large, then 2x2 means: exact areas take two to three times as long.
        image = cv2.resize(image, (2 * width, 2 * height), interpolation=cv2.INTER_LINEAR)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def check(data: bytes) -> tuple[int, int, bool]:
    """Reads an image to its end, all bits and few pixels; raises as `decode` does.

    Returns height and width as displayed, and whether it is nearly black or of one color.
    """
    pixels, height, width = decode_at_least(data, 1)
    high, low = pixels.max((0, 1)), pixels.min((0, 1))
    return height, width, bool(high.max() < BLACK or np.all(high - low < PLAIN))


def dimensions(data: bytes) -> tuple[int, int]:
    """Reads (height, width) as displayed from the header alone; raises as `decode` does."""
    with _opened(data) as image:
        return _size(image)


def effort(data: bytes) -> int:
    """Returns by the header how many pixels there are to decode; raises as `decode` does.

    Those of a JPEG, which take an eighth of the time, count so much in every scan.
    """
    with _opened(data) as image:
        pixels = image.width * image.height
        return pixels * _scans(data) // 8 if image.format in ("JPEG", "MPO") else pixels


def read_file(path: str | os.PathLike) -> bytes:
    """Reads the file of an image; raises OSError, or ValueError where it cannot be one."""
    return read_regular(path, MAX_BYTES)


def looks_like_image(path: str | os.PathLike) -> bool:
    """Returns whether a file is taken for an image: by its ending, else by its first bytes."""
    if Path(path).suffix.lower() in ENDINGS:
        return True
    try:
        head = read_regular(path, head=12)
    except (OSError, ValueError):
        return False
    return head.startswith((b"\xff\xd8\xff", PNG, b"GIF8")) or (
        head[:4] == b"RIFF" and head[8:] == b"WEBP"
    )


def _read(image: Image.Image, data: bytes, reduction: int) -> np.ndarray:
    """Reads the pixels of an opened image, a JPEG's at a fraction of its size."""
    width, height = (-(-side // reduction) for side in image.size)
    profile = image.info.get("icc_profile")
    plain = image.mode == "RGB" or image.mode == "L" and not profile
    if image.format in ("JPEG", "MPO") and plain and _orientation(image) == 1:
        # What is damaged, or merely odd, Pillow can tell apart.
        with contextlib.suppress(ValueError):
            pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
            transform = profile and _to_srgb(profile, "RGB")
            return np.asarray(transform.apply(Image.fromarray(pixels))) if transform else pixels
    image.draft(None, (width, height))  # Nothing happens for formats but JPEG.
    return to_rgb(image)


def to_rgb(image: Image.Image) -> np.ndarray:
    """Turns an image of Pillow as its EXIF says, in any mode, into uint8 [H, W, 3] of sRGB.

    Damaged files raise nearly anything.
    """
    image.load()
    profile = image.info.get("icc_profile")
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # more than 8 bits, which Pillow would clip
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(BAND_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):  # Conversions take memory several times over.
        band = pixels[top : top + rows]
        part = image.crop((0, top, image.width, top + len(band)))
        band[:] = np.asarray(_on_white(part, profile))
    return pixels


def _on_white(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Makes RGB of sRGB of an image of 8 bits in any mode."""
    if not image.has_transparency_data:
        return _in_srgb(image, profile)
    colors = image.convert("L") if image.mode in ("LA", "La", "L") else image.convert("RGBA")
    opaque = Image.new("RGB", image.size, "white")
    opaque.paste(_in_srgb(colors, profile), mask=image.convert("RGBA").getchannel("A"))
    return opaque


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Makes RGB of an image without transparency, its colors those of sRGB."""
    modes = {"L": ("L", "RGB"), "CMYK": ("CMYK",)}.get(image.mode, ("RGB",))
    for mode in modes if profile else ():
        if transform := _to_srgb(profile, mode):
            return transform.apply(image.convert(mode))
    return image.convert("RGB")


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Returns what makes sRGB of a profile's colors.

    None for one that is damaged, of another mode, or sRGB under whatever name: no color changes by
    more than two levels of 255, to which profiles are rounded.
    """
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            # Threads share it. Without the second flag, highlights and shadows would be cut off.
            ImageCms.Flags.NOCACHE | ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode != "CMYK":
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
        colors = Image.fromarray(cube).convert(mode)
        change = np.asarray(transform.apply(colors)).astype(int) - np.asarray(colors.convert("RGB"))
        if np.abs(change).max() <= 2:
            return None
    return transform


def _size(image: Image.Image) -> tuple[int, int]:
    """Returns (height, width) as displayed of an image that may not be loaded."""
    width, height = image.size
    return (width, height) if _orientation(image) in (5, 6, 7, 8) else (height, width)


def _orientation(image: Image.Image) -> int:
    """Returns how an image still has to be turned: a value of the EXIF tag."""
    if image.format == "TIFF":  # Pillow's size is as displayed, and loading turns the pixels.
        return 1
    try:  # That of a PNG would decode it, for the sake of what `_metadata_first` has moved.
        return Image.Image.getexif(image).get(ORIENTATION, 1)
    except Exception:  # A broken EXIF block does not make the image unreadable.
        return 1


def _metadata_first(png: bytes) -> bytes:
    """Moves what may turn a PNG from behind its pixels to where headers are read."""
    kinds = {b"IHDR": 0, b"eXIf": 1, b"iTXt": 1, b"zTXt": 1, b"tEXt": 1}
    chunks, at = [], 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4])
        kind, sum = png[at + 4 : at + 8], int.from_bytes(png[end - 4 : end])
        whole = kind in kinds and zlib.crc32(png[at + 4 : end - 4]) == sum
        chunks.append((kinds[kind] if whole else 2, png[at:end]))
        at = end
    return png[:8] + b"".join(chunk for _, chunk in sorted(chunks, key=lambda pair: pair[0]))


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Opens an image with Pillow; whatever is wrong with it in the block is a ValueError."""
    try:
        if not data:
            raise ValueError("empty file")
        file = io.BytesIO(_metadata_first(data) if data.startswith(PNG) else data)
        with Image.open(file, formats=FORMATS) as image:
            _check_size(*image.size)
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                # A tile may be larger than the image, and is decoded whole.
                _check_size(*(image.tag_v2.get(tag, 0) for tag in (TILE_WIDTH, TILE_LENGTH)))
            if image.format in ("JPEG", "MPO"):
                scans, most = _scans(data), SCANNED_PIXELS // (image.width * image.height)
                if scans > min(MAX_SCANS, max(most, 1)):
                    remedy = "a decompression bomb? save it anew, not progressive"
                    raise ValueError(f"a JPEG of {scans} scans, too many for its size ({remedy})")
            yield image
    except Exception as error:  # Pillow's plugins raise nearly anything on broken files.
        raise ValueError(_reason(error, data)) from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} is {TOO_MANY}")


def _scans(jpeg: bytes) -> int:
    """Counts the scans of a JPEG, skipping segments as a decoder does."""
    at, scans = 2, 0
    while (found := MARKER.search(jpeg, at)) and found[1][0] != END:
        scans += found[1][0] == SCAN
        at = found.end() + int.from_bytes(jpeg[found.end() : found.end() + 2])
    return scans


def _eight_bits(gray: np.ndarray) -> np.ndarray:
    """Scales whole numbers of 16 bits to uint8 [H, W]."""
    low, high = gray.min(), gray.max()
    if gray.dtype.kind == "f" or low < 0 or high > 65535:
        raise ValueError(
            f"holds values from {low:,} to {high:,}; whole numbers from 0 to 65,535 can be shown"
        )
    return (gray >> 8).astype(np.uint8)


def _reason(error: Exception, data: bytes) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        if impostor := describe_impostor(data):
            return f"{impostor}, not an image"
        heic = data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
        if heic and "HEIF" not in FORMATS:
            return "a HEIC image: pip install pillow-heif to read it"
        if data[4:12] == b"ftypavif" and "AVIF" not in FORMATS:
            return "an AVIF image: pip install -U pillow to read it"
        return "not an image, or damaged at its beginning"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has {TOO_MANY}"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"a damaged HEIC image: {text}" if text.startswith("Invalid input") else text
