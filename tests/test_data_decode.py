"""Decoding against Pillow, resizing against means worked out by hand."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from cgd_jax.data import decode as decode_module
from cgd_jax.data.decode import check, decode, resize
from tests.dataset_samples import encoded, picture


def photograph(width, height, seed=0):
    return Image.open(io.BytesIO(picture(seed, width, height, "PNG"))).convert("RGB")


def by_pillow(data, size=None):
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    return np.asarray(image if size is None else image.resize((size, size), Image.BILINEAR))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_common_formats_equal_pillow(kind, mode):
    data = encoded(photograph(37, 23).convert(mode), kind)
    pixels = decode(data)
    assert pixels.dtype == np.uint8 and pixels.shape == (23, 37, 3)
    np.testing.assert_allclose(pixels.astype(int), by_pillow(data), atol=2)
    assert check(data) == (23, 37, False)


def test_progressive_jpeg():
    data = encoded(photograph(37, 23), "JPEG", progressive=True)
    np.testing.assert_allclose(decode(data).astype(int), by_pillow(data), atol=2)


def test_cmyk_is_not_inverted():
    image = photograph(30, 20)
    data = encoded(image.convert("CMYK"), "JPEG")
    np.testing.assert_allclose(decode(data).astype(int), np.asarray(image), atol=12)
    assert decode(data, size=8).shape == (8, 8, 3)


def test_sixteen_bits_are_scaled_and_not_clipped():
    grey = (np.arange(256, dtype=np.uint16).reshape(16, 16)) * 257
    data = encoded(Image.fromarray(grey), "PNG")
    expected = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, -1)
    np.testing.assert_array_equal(decode(data), expected)


def test_palette_with_transparency_is_laid_on_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 2), 1)
    pixels = decode(encoded(image, "PNG", transparency=0))
    assert pixels[2, 1].tolist() == [200, 100, 50]
    assert pixels[0, 0].tolist() == [255, 255, 255]
    opaque = decode(encoded(image, "PNG"))
    assert opaque[0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_on_white(mode):
    image = Image.new("RGBA", (6, 5), (0, 0, 0, 0))
    image.putpixel((3, 2), (80, 80, 80, 255))
    image.putpixel((4, 2), (0, 0, 0, 128))
    pixels = decode(encoded(image.convert(mode), "PNG"))
    assert pixels[0, 0].tolist() == [255] * 3
    assert pixels[2, 3].tolist() == [80] * 3
    assert abs(int(pixels[2, 4, 0]) - 127) <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_rotation(orientation, kind):
    image = photograph(64, 32)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif)
    upright = by_pillow(data)
    assert upright.shape[:2] == ((64, 32) if orientation >= 5 else (32, 64))
    np.testing.assert_allclose(decode(data).astype(int), upright, atol=2)
    assert check(data)[:2] == upright.shape[:2]
    # Boxes are those of the upright image, also at reduced size.
    box = decode(data, bbox=(4, 8, 30, 28))
    np.testing.assert_allclose(box.astype(int), upright[8:28, 4:30], atol=2)
    small = decode(data, bbox=(0, 0, upright.shape[1], upright.shape[0]), size=8)
    assert np.abs(small.astype(int) - by_pillow(data, 8)).mean() < 6


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_ignored():
    data = encoded(photograph(20, 10), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode(data).shape == (10, 20, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "width, height", [(252, 252), (300, 260), (640, 480), (1300, 500), (97, 60)]
)
def test_resizing_is_close_to_pillow(kind, width, height):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    data = encoded(noise.resize((width, height), Image.BICUBIC), kind)
    pixels = decode(data, size=252)
    assert pixels.shape == (252, 252, 3) and pixels.flags.c_contiguous
    assert np.abs(pixels.astype(int) - by_pillow(data, 252)).mean() < 3


@pytest.mark.parametrize("factor", [2, 3, 4, 5, 8])
def test_shrinking_does_not_alias(factor):
    # A chequerboard of single pixels is grey from afar; picking pixels would give 0 or 255.
    side = 16 * factor
    board = (np.indices((side, side)).sum(0) % 2 * 255).astype(np.uint8)
    small = resize(np.repeat(board[..., None], 3, -1), 16)
    assert np.all(np.abs(small.astype(int) - 127.5) < 60)
    assert abs(small.mean() - 127.5) < 2


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64), st.integers(0, 255))
def test_a_plain_image_stays_plain(width, height, size, grey):
    image = np.full((height, width, 3), grey, np.uint8)
    np.testing.assert_array_equal(resize(image, size), np.full((size, size, 3), grey))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_decoding_reduced_never_goes_below_the_target(data):
    width, height = data.draw(st.integers(8, 600)), data.draw(st.integers(8, 600))
    x0, y0 = data.draw(st.floats(-5, width - 2)), data.draw(st.floats(-5, height - 2))
    x1 = data.draw(st.floats(max(x0, 0) + 1, width + 5))
    y1 = data.draw(st.floats(max(y0, 0) + 1, height + 5))
    size = data.draw(st.integers(1, 100))
    sizes = []

    def record(image, size):
        sizes.append(image.shape[:2])
        return resize(image, size)

    file = encoded(Image.new("RGB", (width, height)), "JPEG")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_module, "resize", record)
        decode(file, (x0, y0, x1, y1), size)
    box = min(y1, height) - max(y0, 0), min(x1, width) - max(x0, 0)
    for got, there in zip(sizes[0], box, strict=True):
        assert got >= min(size, int(there))
        assert got <= int(there) + 2


def test_large_jpeg_is_decoded_reduced(monkeypatch):
    shapes = []
    monkeypatch.setattr(
        decode_module, "resize", lambda image, size: shapes.append(image.shape) or image
    )
    data = encoded(Image.new("RGB", (1600, 1200)), "JPEG")
    decode(data, size=100)
    assert shapes[0][:2] == (150, 200)
    decode(data, bbox=(0, 0, 200, 200), size=100)  # The box is what has to stay large enough.
    assert shapes[1][:2] == (100, 100)


def test_box_is_cut_out_where_it_says():
    image = Image.new("RGB", (400, 300), "black")
    image.paste((255, 0, 0), (100, 50, 300, 250))
    for size in (None, 20, 50, 300):
        for kind in ("JPEG", "PNG"):
            pixels = decode(encoded(image, kind), (100, 50, 300, 250), size)
            assert pixels.shape == ((200, 200, 3) if size is None else (size, size, 3))
            inner = pixels[2:-2, 2:-2].astype(int)
            assert inner[..., 0].min() > 245 and inner[..., 1:].max() < 10
    clipped = decode(encoded(image, "PNG"), (-50, -10, 1000, 40))
    assert clipped.shape == (40, 400, 3)


@pytest.mark.parametrize("box", [(5, 5, 5, 9), (9, 5, 5, 9), (100, 0, 120, 9), (0, -9, 9, 0)])
def test_empty_box(box):
    with pytest.raises(ValueError, match="empty box"):
        decode(picture(), box)


def bomb(width=30_000, height=30_000):
    """A PNG of a few bytes that claims to be huge."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = zlib.compress(b"\0" * 1000)
    chunks = (b"IHDR", header), (b"IDAT", content), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


def jpeg_bomb():
    data = bytearray(picture())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
    return bytes(data)


BAD = {
    "empty": (b"", "empty"),
    "text": (b"not a picture at all", "not an image"),
    "jpeg header only": (picture()[:100], "."),
    "half a jpeg": (picture(1, 200, 200)[: len(picture(1, 200, 200)) // 2], "truncated"),
    "jpeg without its last bytes": (picture(1, 200, 200)[:-60], "truncated"),
    "half a png": (picture(1, 200, 200, "PNG")[:-400], "."),
    "half a webp": (picture(1, 200, 200, "WEBP")[:-100], "."),
    "png bomb": (bomb(), "bomb"),
    "smaller png bomb": (bomb(10_000, 10_000), "bomb"),
    "jpeg bomb": (jpeg_bomb(), "bomb"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD)
def test_bad_images_raise_with_a_reason(name):
    data, reason = BAD[name]
    for function in (check, decode, lambda data: decode(data, size=16)):
        with pytest.raises(ValueError, match=reason):
            function(data)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 300), st.sampled_from(["JPEG", "PNG", "GIF", "WEBP"]))
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_damage_gives_an_image_or_a_reason(junk, at, kind):
    data = picture(kind=kind)
    data = data[:at] + junk + data[at + len(junk) :]
    try:
        pixels = decode(data, size=8)
    except ValueError as error:
        assert str(error)
    else:
        assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8


@pytest.mark.parametrize("orientation", [1, 6])
def test_heic(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = photograph(64, 32)
    data = encoded(image, "HEIF", quality=100, exif=exif.tobytes())
    pixels = decode(data)
    upright = np.asarray(image if orientation == 1 else image.transpose(Image.Transpose.ROTATE_270))
    # Its colours have half the resolution.
    assert np.abs(pixels.astype(int) - upright).mean() < 6
    assert check(data) == (*upright.shape[:2], False)


def test_without_its_package_heic_is_named(monkeypatch):
    data = encoded(photograph(16, 16), "HEIF")
    known = [name for name in decode_module.FORMATS if name != "HEIF"]
    monkeypatch.setattr(decode_module, "FORMATS", known)
    with pytest.raises(ValueError, match="a HEIC image: pip install pillow-heif"):
        decode(data)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
        (b"<!doctype html><html></html>", "an HTML page .*, not an image"),
        (b"\xef\xbb\xbf\r\n  <HTML>", "an HTML page"),
    ],
)
def test_what_is_no_picture_at_all_is_named(data, reason):
    with pytest.raises(ValueError, match=reason):
        check(data)


def test_no_other_program_is_started():
    # Pillow hands EPS to Ghostscript, whatever the name of the file.
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    assert Image.open(io.BytesIO(data)).format == "EPS"
    with pytest.raises(ValueError, match="not an image"):
        decode(data)


@pytest.mark.parametrize("dtype, high", [(np.float32, 1.0), (np.float32, 255.0)])
def test_floating_point_pictures_are_of_known_range(dtype, high):
    grey = np.linspace(0, high, 60, dtype=dtype).reshape(6, 10)
    data = encoded(Image.fromarray(grey), "TIFF")
    expected = np.rint(grey / high * 255).astype(np.uint8)
    np.testing.assert_array_equal(decode(data), np.repeat(expected[..., None], 3, -1))


@pytest.mark.parametrize(
    "grey, reason",
    [
        (np.float32([[0, 256]]), "values from 0.0 to 256.0; 0 to 1 or 0 to 255"),
        (np.float32([[-0.5, 0.5]]), "values from -0.5 to 0.5"),
        (np.float32([[np.nan, 0.5]]), "values from nan"),
        (np.int32([[0, 70_000]]), "values from 0 to 70,000; 0 to 65,535"),
    ],
)
def test_other_ranges_are_refused(grey, reason):
    with pytest.raises(ValueError, match=reason):
        decode(encoded(Image.fromarray(grey), "TIFF"))


def test_blank_pictures():
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    dark = Image.fromarray(noise // 17)  # up to 15 of 255
    for image, blank in (
        (Image.new("RGB", (30, 20), (200, 10, 99)), True),
        (dark, True),
        (Image.fromarray(noise), False),
        (Image.fromarray(noise // 4), False),
        (Image.fromarray(noise // 16 + 240), False),  # bright, but not plain
    ):
        for kind in ("PNG", "JPEG"):
            assert check(encoded(image, kind))[2] == blank, kind
