"""Decoding against Pillow, resizing against means worked out by hand."""

import io
import os
import socket
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, ImageOps, PngImagePlugin

from cgd_jax.data import decode as decode_module
from cgd_jax.data import images
from cgd_jax.data.decode import check, decode, resize
from cgd_jax.runtime.errors import InputError
from tests import color_profiles
from tests.dataset_samples import TURNS, encoded, jpeg_bomb, picture, write


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


def png_chunk(kind, content):
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def behind_the_pixels(image, exif):
    return encoded(image, "PNG")[:-12] + png_chunk(b"eXIf", exif.tobytes()[6:]) + END_OF_PNG


def by_xmp(image, exif):
    xmp = f'<x xmlns:tiff="t" tiff:Orientation="{exif[0x0112]}"/>'
    return encoded(image, "JPEG", xmp=xmp.encode(), quality=95)


def behind_a_long_header(image, exif):
    data = encoded(image, "JPEG", exif=exif, quality=95)
    segment = b"\xff\xed" + struct.pack(">H", 65_535) + bytes(65_533)
    return data[:2] + 2 * segment + data[2:]


def long_exif(kind):
    """Returns what writes an image whose EXIF is longer than 64 kB, as makers' notes may be."""

    def write_it(image, exif):
        exif[0x010E] = "a description " * 10_000
        return encoded(image, kind, exif=exif, quality=95)

    return write_it


END_OF_PNG = png_chunk(b"IEND", b"")
TURNED = {
    **{
        kind: lambda image, exif, kind=kind: encoded(image, kind, exif=exif, quality=95)
        for kind in ("JPEG", "PNG", "WEBP", "AVIF", "MPO")
    },
    "HEIF": lambda image, exif: encoded(image, "HEIF", exif=exif.tobytes(), quality=95),
    "TIFF": lambda image, exif: encoded(image, "TIFF", exif=exif),
    "TIFF, Deflate": lambda image, exif: encoded(
        image, "TIFF", exif=exif, compression="tiff_adobe_deflate"
    ),
    "TIFF, JPEG": lambda image, exif: encoded(
        image, "TIFF", exif=exif, compression="jpeg", quality=95
    ),
    "JPEG, grey": lambda image, exif: encoded(image.convert("L"), "JPEG", exif=exif, quality=95),
    "JPEG, CMYK": lambda image, exif: encoded(image.convert("CMYK"), "JPEG", exif=exif, quality=95),
    "JPEG, XMP": by_xmp,
    "JPEG, EXIF beyond 64 kB": behind_a_long_header,
    "PNG, EXIF behind the pixels": behind_the_pixels,
    "PNG, EXIF of 140 kB": long_exif("PNG"),
    "WEBP, EXIF of 140 kB": long_exif("WEBP"),
}


@pytest.mark.parametrize("kind", TURNED)
def test_orientation_of_dimensions_crops_boxes_thumbnails_and_pixels(kind):
    image = photograph(64, 32)
    if "grey" in kind:
        image = image.convert("L").convert("RGB")
    for orientation, turn in TURNS.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = TURNED[kind](image, exif)
        upright = turn(np.asarray(image)).astype(int)
        height, width = (64, 32) if orientation >= 5 else (32, 64)
        assert upright.shape == (height, width, 3)
        assert decode_module.dimensions(data) == check(data)[:2] == (height, width)
        whole = decode(data)
        assert whole.shape == upright.shape
        assert np.abs(whole - upright).mean() < 8
        np.testing.assert_array_equal(decode_module.to_rgb(Image.open(io.BytesIO(data))), whole)
        turned = Image.open(io.BytesIO(data))
        for content in (data, turned, whole):  # as a network or a search crops them
            part = images.cut(images.load(content), 8, (4, 8, 28, 24))
            assert np.abs(part - resize(whole[8:24, 4:28], 8).astype(int)).mean() < 8
            assert images.extent(images.load(content)) == (height, width)
            assert images.extent(images.load(content), (4, 8, 28, 24)) == (16, 24)
        box = decode(data, bbox=(4, 8, 30, 28))
        assert np.abs(box - upright[8:28, 4:30]).mean() < 8
        small = decode(data, size=8)  # a JPEG is decoded reduced, and turned then
        assert np.abs(small - resize(upright.astype(np.uint8), 8).astype(int)).mean() < 8


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


@pytest.mark.parametrize(
    "box", [(5, 5, 5, 9), (9, 5, 5, 9), (100, 0, 120, 9), (0, -9, 9, 0), (np.nan, 0, 5, 5)]
)
def test_empty_box(box):
    with pytest.raises(ValueError, match="empty box"):
        decode(picture(), box)


def test_boxes_are_clipped_to_the_image_and_widened_to_whole_pixels():
    assert decode_module.clip((1.5, 2, 9.2, 12), 20, 30) == (1, 2, 10, 12)
    assert decode_module.clip((-5, -1, 100, 200), 20, 30) == (0, 0, 30, 20)
    assert decode_module.clip((5, 5, 5 + 1e-9, 9), 20, 30) == (5, 5, 6, 9)
    assert decode_module.clip(None, 20, 30) == (0, 0, 30, 20)


def bomb(width=30_000, height=30_000):
    """A PNG of a few bytes that claims to be huge."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + END_OF_PNG


def of_many_scans(scans, **options):
    """A progressive JPEG whose last scan is there again and again."""
    data = encoded(photograph(64, 64), "JPEG", progressive=True, **options)
    last, usual = data.rindex(b"\xff\xda"), data.count(b"\xff\xda")
    return data[:last] + data[last:-2] * (scans - usual + 1) + data[-2:]


def test_scans_of_progressive_jpegs_are_counted_and_bounded(monkeypatch):
    assert check(of_many_scans(100))[:2] == (64, 64)
    for function in (check, decode_module.dimensions):
        with pytest.raises(ValueError, match="a JPEG of 101 scans"):
            function(of_many_scans(101))
    # What looks like a scan within a segment, or behind the image, is none.
    data = of_many_scans(100)
    segment = b"\xff\xed\0\x20" + 10 * b"\xff\xda\0"
    assert check(data[:2] + segment + data[2:] + 9 * b"\xff\xda\0\3\0")[:2] == (64, 64)
    # The larger the image, the fewer; but one scan is always allowed.
    monkeypatch.setattr(decode_module, "SCANNED_PIXELS", 12 * 64 * 64)
    assert check(of_many_scans(12)) and pytest.raises(ValueError, check, of_many_scans(13))
    monkeypatch.setattr(decode_module, "SCANNED_PIXELS", 1)
    assert check(picture())


BAD = {
    "empty": (b"", "empty"),
    "text": (b"not a picture at all", "not an image"),
    "jpeg header only": (picture()[:100], "."),
    "half a jpeg": (picture(1, 200, 200)[: len(picture(1, 200, 200)) // 2], "truncated"),
    "jpeg without its last bytes": (picture(1, 200, 200)[:-60], "truncated"),
    "half a png": (picture(1, 200, 200, "PNG")[:-400], "."),
    "half a webp": (picture(1, 200, 200, "WEBP")[:-100], "."),
    "png bomb": (bomb(), "bomb"),
    "smaller png bomb": (bomb(15_000, 15_000), "bomb"),
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


def test_without_its_package_heic_is_named(monkeypatch):
    data = encoded(photograph(16, 16), "HEIF")
    known = [name for name in decode_module.FORMATS if name != "HEIF"]
    monkeypatch.setattr(decode_module, "FORMATS", known)
    with pytest.raises(ValueError, match="a HEIC image: pip install pillow-heif"):
        decode(data)


@pytest.mark.parametrize("kind, end", [("HEIF", 40), ("AVIF", 20)])
def test_damaged_files_do_not_ask_for_a_package_that_is_there(kind, end):
    with pytest.raises(ValueError) as error:
        check(encoded(photograph(16, 16), kind)[:end])
    assert "pip install" not in str(error.value)


def test_a_heic_that_is_cut_off_is_damaged_in_one_line():
    data = encoded(photograph(64, 64), "HEIF")
    with pytest.raises(ValueError, match=r"\Aa damaged HEIC image: .*\Z"):
        check(data[:-20])


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


@pytest.mark.parametrize(
    "grey, reason",
    [
        (np.float32([[0, 0.5]]), "values from 0.0 to 0.5; whole numbers"),
        (np.int32([[0, 70_000]]), "values from 0 to 70,000; whole numbers from 0 to 65,535"),
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


P3, ADOBE = (color_profiles.DISPLAY_P3, 2.2), (color_profiles.ADOBE_RGB, 2.2)


@pytest.mark.parametrize("numbers", [P3, ADOBE], ids=["Display P3", "Adobe RGB"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_colors_of_other_profiles_become_those_of_srgb(kind, numbers):
    image = photograph(64, 48)
    profile = color_profiles.profile(*numbers)
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind != "PNG" else {}
    data = encoded(image, kind, icc_profile=profile, **options)
    plain = decode(encoded(image, kind, **options))
    expected = color_profiles.in_srgb(plain, *numbers)
    assert np.abs(expected - plain).mean() > 4  # so much is lost without
    whole = decode(data)
    np.testing.assert_allclose(whole, expected, atol=2)
    np.testing.assert_array_equal(decode_module.to_rgb(Image.open(io.BytesIO(data))), whole)
    np.testing.assert_array_equal(decode(data, (8, 4, 40, 30)), whole[4:30, 8:40])
    small = decode(data, size=8)  # a JPEG is decoded reduced
    assert np.abs(small - resize(expected.astype(np.uint8), 8).astype(int)).mean() < 4


def test_profiles_of_odd_modes():
    rng = np.random.default_rng(0)
    grey = Image.fromarray(rng.integers(0, 256, (9, 8), dtype=np.uint8))
    gamma = color_profiles.profile(None, 1.8, b"GRAY")
    neutral = color_profiles.profile(color_profiles.ADOBE_RGB, 1.8)
    expected = color_profiles.in_srgb(np.stack([grey] * 3, -1), color_profiles.SRGB, 1.8)
    for profile in (gamma, neutral):
        for kind in ("PNG", "TIFF"):
            pixels = decode(encoded(grey, kind, icc_profile=profile))
            np.testing.assert_allclose(pixels, expected, atol=2)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    pixels = decode(encoded(deep, "PNG", icc_profile=gamma))
    np.testing.assert_allclose(pixels, expected, atol=2)

    colors = photograph(9, 8)
    palette = colors.quantize(200)
    pixels = decode(encoded(palette, "PNG", icc_profile=color_profiles.profile(*P3)))
    expected = color_profiles.in_srgb(np.asarray(palette.convert("RGB")), *P3)
    np.testing.assert_allclose(pixels, expected, atol=2)
    for mode, profile in (("RGBA", color_profiles.profile(*P3)), ("LA", gamma)):
        clear = colors.convert(mode)
        clear.putalpha(0)
        pixels = decode(encoded(clear, "PNG", icc_profile=profile))
        assert pixels.min() == 255  # white stays white


def test_profiles_that_are_srgb_or_broken_change_nothing():
    image = photograph(40, 30)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey = color_profiles.profile(None, 1.8, b"GRAY")  # of an image that has colors
    for profile in (srgb, grey, b"no profile", color_profiles.profile(*P3)[:200]):
        for kind in ("JPEG", "PNG"):
            data = encoded(image, kind, icc_profile=profile)
            np.testing.assert_array_equal(decode(data), decode(encoded(image, kind)))


def test_pngs_with_megabytes_of_text_or_profile():
    image = photograph(20, 10)
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 5_000_000, zip=True)
    text.add_itxt("prompt", "y" * 3_000_000, zip=True)
    profile = color_profiles.profile(*P3, padding=4_000_000)
    data = encoded(image, "PNG", pnginfo=text, icc_profile=profile)
    np.testing.assert_allclose(decode(data), color_profiles.in_srgb(np.asarray(image), *P3), atol=2)
    behind = encoded(image, "PNG")[:-12] + png_chunk(b"tEXt", b"a\0" + bytes(2_000_000))
    assert check(behind + END_OF_PNG)[:2] == (10, 20)


def test_headers_are_read_without_decoding(monkeypatch):
    files = {}
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"):
        files[kind] = encoded(photograph(64, 32), kind)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = behind_the_pixels(photograph(32, 64), exif)

    def load(image):
        pytest.fail("decoded")

    for cls in (ImageFile.ImageFile, *map(type, map(Image.open, map(io.BytesIO, files.values())))):
        monkeypatch.setattr(cls, "load", load)
    for kind, data in (*files.items(), ("PNG, turned", turned)):
        assert decode_module.dimensions(data) == (32, 64), kind


def test_one_decoding_gives_every_size(monkeypatch):
    opened = []
    real = Image.open
    monkeypatch.setattr(
        decode_module.Image, "open", lambda *a, **k: opened.append(real(*a, **k)) or opened[-1]
    )
    data = encoded(photograph(640, 480), "PNG")
    opened.clear()
    pixels, *size = decode_module.decode_at_least(data, 100, (10, 20, 330, 340))
    assert len(opened) == 1 and size == [480, 640]
    np.testing.assert_array_equal(pixels, decode(data)[20:340, 10:330])
    jpeg = encoded(photograph(640, 480), "JPEG")
    reduced, *size = decode_module.decode_at_least(jpeg, 100)
    assert size == [480, 640] and reduced.shape == (120, 160, 3)
    np.testing.assert_array_equal(resize(reduced, 100), decode(jpeg, size=100))


def tile_bomb():
    """A TIFF of 16×16 pixels that lie in a tile of 20,000×20,000."""
    entries = [
        *((256, 4, 16), (257, 4, 16), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1)),
        *((322, 4, 20_000), (323, 4, 20_000), (324, 4, 8)),
    ]
    content = zlib.compress(bytes(400_000_000), 1)
    entries.append((325, 4, len(content)))
    table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    start = 8 + len(content) + len(content) % 2
    body = content + bytes(len(content) % 2)
    return (
        b"II*\0"
        + struct.pack("<I", start)
        + body
        + struct.pack("<H", len(entries))
        + table
        + bytes(4)
    )


def icon_bomb():
    """An icon of 16×16 pixels whose PNG is of 30,000×30,000."""
    png = bomb()
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(png), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + png


def frame_bomb():
    """A GIF of 16×16 pixels whose first frame is of 60,000×60,000."""
    data = bytearray(encoded(Image.new("P", (16, 16)), "GIF"))
    at = data.index(b",\0\0\0\0")
    data[at + 5 : at + 9] = struct.pack("<HH", 60_000, 60_000)
    return bytes(data)


# Runs below a limit of memory that the whole of none of these would stay below.
BOUNDED = """
import resource, sys
from cgd_jax.data import decode
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
for path in sys.argv[1:]:
    try:
        print(decode.looks_like_image(path), decode.check(decode.read_file(path)))
    except (OSError, ValueError) as error:
        print(error)
"""


def test_what_never_ends_or_is_too_much_is_refused_in_little_memory(tmp_path):
    def path(name):
        return os.path.join(os.path.relpath(tmp_path), name)

    expected = {"pipe.jpg": "not a file", "zero.png": "not a file", "folder.jpg": "not a file"}
    os.mkfifo(path("pipe.jpg"))
    os.symlink("/dev/zero", path("zero.png"))
    os.mkdir(path("folder.jpg"))
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path("socket.gif"))
    expected["socket.gif"] = "not a file"
    with open(path("sparse.jpg"), "wb") as file:
        file.truncate(1 << 40)
    expected["sparse.jpg"] = "larger than 1.6 GB"
    for name, data in {
        "tile.tif": tile_bomb(),
        "icon.ico": icon_bomb(),
        "frame.gif": frame_bomb(),
    }.items():
        write(tmp_path, {name: data})
        expected[name] = "bomb"
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, *map(path, expected)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    for (name, reason), line in zip(expected.items(), done.stdout.splitlines(), strict=True):
        assert reason in line, (name, line)


PEAKS = """
import os, sys
from cgd_jax.data import decode
for path in sys.argv[1:]:
    child = os.fork()
    if not child:
        decode.decode(decode.read_file(path), size=224)
        os._exit(0)
    _, status, used = os.wait4(child, 0)
    print(used.ru_maxrss * 1024 if status == 0 else "failed")
"""
LARGE = {
    **{f"PNG {mode}": ("PNG", mode, {}) for mode in ("L", "P", "LA", "RGB", "RGBA", "I;16")},
    **{f"JPEG {mode}": ("JPEG", mode, {}) for mode in ("L", "RGB", "CMYK")},
    **{f"TIFF {mode}": ("TIFF", mode, {}) for mode in ("RGBA", "CMYK", "I;16")},
    **{f"WEBP {mode}": ("WEBP", mode, {}) for mode in ("RGB", "RGBA")},
    "GIF": ("GIF", "P", {}),
    "PNG with a profile": ("PNG", "RGBA", {"icc_profile": color_profiles.profile(*P3)}),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems count memory otherwise")
def test_decoding_takes_as_much_memory_as_is_said(tmp_path):
    """Whatever the file says; the server lets images in by their pixels."""
    width, height = 4000, 3000
    for name, (kind, mode, options) in {"none": ("PNG", "L", {}), **LARGE}.items():
        image = Image.new("L", (width, height) if name in LARGE else (9, 9))
        image = Image.new(mode, image.size) if mode == "I;16" else image.convert(mode)
        for turned in (1, 6):
            exif = Image.Exif()
            exif[0x0112] = turned
            options = options | ({"exif": exif} if kind != "GIF" else {})
            write(tmp_path, {f"{turned} {name}": encoded(image, kind, **options)})
    names = [f"{turned} {name}" for turned in (1, 6) for name in ("none", *LARGE)]
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, *(str(tmp_path / name) for name in names)],
        capture_output=True,
        text=True,
        check=True,
    )
    peaks = dict(zip(names, map(int, done.stdout.split()), strict=True))
    of_pixel = {name: (peak - peaks["1 none"]) / (width * height) for name, peak in peaks.items()}
    print({name: round(taken, 1) for name, taken in of_pixel.items()})
    for name, taken in of_pixel.items():
        most = 13 if "WEBP" not in name else 16 if name.startswith("1") else 20
        assert taken < most + 1, name
    assert of_pixel["1 PNG RGBA"] > 4 and of_pixel["1 JPEG RGB"] < 1


def test_pipes_and_devices_are_no_images_for_a_network_either(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", "/dev/zero", tmp_path):
        with pytest.raises(InputError, match=f"{path}: not a file"):
            images.read_image(path, 8)


@pytest.mark.parametrize("most, expected", [("255", "bomb"), ("256", "(16, 16)")])
def test_the_limit_of_pixels_is_set_by_the_environment(most, expected):
    code = "import sys; from cgd_jax.data import decode; "
    code += "print(decode.dimensions(sys.stdin.buffer.read()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=encoded(photograph(16, 16), "PNG"),
        capture_output=True,
        env=os.environ | {"CGD_JAX_MAX_PIXELS": most},
        check=False,
    )
    assert expected in (done.stdout + done.stderr).decode()


@pytest.mark.parametrize("most", ["many", "2e8", "0", "-5", ""])
def test_a_limit_of_pixels_that_is_no_number_is_one_sentence(most):
    with pytest.raises(InputError, match=f"MAX_PIXELS='{most}' is no number.*such as 400000000"):
        decode_module.max_pixels(most)


def test_a_command_says_what_is_wrong_with_the_limit_of_pixels():
    done = subprocess.run(
        [sys.executable, "-m", "cgd_jax", "data", "--config=glyphs"],
        capture_output=True,
        env=os.environ | {"CGD_JAX_MAX_PIXELS": "many"},
        check=False,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: The environment variable CGD_JAX_MAX_PIXELS='many' is")
