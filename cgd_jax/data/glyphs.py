"""glyphs: which character is this, in a typeface you have not seen it in?

Classes are characters, images are their renderings in the DejaVu and STIX General
faces that the matplotlib package ships. Real letterforms, nothing to download, and
thousands of classes with few images each, like Stanford Online Products.
"""

import io
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from cgd_jax.data.builder import DrawnBuilder
from cgd_jax.runtime import console

IMAGE_SIZE = 32  # pixels
FONT_SIZE = 20  # pixels; leaves room for accents above and tails below
MIN_FACES = 8  # a character needs that many faces that have it
MIN_IMAGES = 5  # a class needs that many different images
SPLIT_SEED = 0

# One rendering: (face, character, pixels as bytes).
Rendering = tuple[str, str, bytes]


class Glyphs(DrawnBuilder):
    """TFDS builder of the rendered characters; splits train and test by class."""

    def _split_generators(self, dl_manager):
        classes = glyph_classes()
        shuffled = np.random.default_rng(SPLIT_SEED).permutation(len(classes))
        half = len(classes) // 2
        return {
            "train": self._generate_examples(classes, np.sort(shuffled[:half])),
            "test": self._generate_examples(classes, np.sort(shuffled[half:])),
        }

    def _generate_examples(self, classes, numbers):
        key = 0
        for number in numbers:
            for face, character, pixels in classes[number]:
                yield (
                    key,
                    {
                        "image": _png(pixels),
                        "label": int(number),
                        "class_name": class_name(classes[number]),
                        "id": f"U+{ord(character):04X} {face}",
                    },
                )
                key += 1


def glyph_classes() -> list[list[Rendering]]:
    """Renders all characters and sorts them into classes, by their first characters.

    Characters with identical pixels in some face (Latin A, Greek Alpha, Cyrillic A) are one class,
    identical images within a class are kept once, and classes with fewer than `MIN_IMAGES` images
    are left out.
    """
    faces = _faces()
    characters_of = {face: sorted(TTFont(face, lazy=True).getBestCmap()) for face in faces}
    coverage = Counter(character for known in characters_of.values() for character in known)
    # Letters, symbols, numbers and punctuation; no marks, separators or controls.
    kept = {
        character
        for character, count in coverage.items()
        if count >= MIN_FACES and unicodedata.category(chr(character))[0] in "LSNP"
    }

    representative = {character: character for character in kept}

    def find(character):
        next_one = representative[character]
        return character if next_one == character else find(next_one)

    renderings = []
    for face in console.counted(faces, "glyphs: rendering faces", "face"):
        # The basic layout engine is in every build of Pillow; the other is not.
        font = ImageFont.truetype(str(face), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
        first_with = {}
        for character in characters_of[face]:
            if character not in kept:
                continue
            pixels = render(chr(character), font)
            if not any(pixels):
                continue
            renderings.append((face.stem, character, pixels))
            twin = first_with.setdefault(pixels, character)
            representative[find(character)] = find(twin)

    classes = defaultdict(dict)  # representative → pixels → rendering
    for face, character, pixels in renderings:
        classes[find(character)].setdefault(pixels, (face, chr(character), pixels))
    members = [list(images.values()) for images in classes.values() if len(images) >= MIN_IMAGES]
    return sorted(members, key=lambda images: min(character for _, character, _ in images))


def render(character: str, font: ImageFont.FreeTypeFont) -> bytes:
    """Draws one character, white on black: `IMAGE_SIZE`² gray values, row by row.

    The font's own box is centered, which takes in the baseline and the advance beside the ink, so
    that a comma stays lower than an apostrophe.
    """
    image = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
    left, top, right, bottom = font.getbbox(character)
    origin = ((IMAGE_SIZE - left - right) / 2, (IMAGE_SIZE - top - bottom) / 2)
    ImageDraw.Draw(image).text(origin, character, font=font, fill=255)
    return image.tobytes()


def class_name(images: list[Rendering]) -> str:
    """Returns the Unicode name of the first character of a class."""
    character = min(character for _, character, _ in images)
    return unicodedata.name(character, f"U+{ord(character):04X}")


def _faces() -> list[Path]:
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    faces = sorted([*folder.glob("DejaVu*.ttf"), *folder.glob("STIXGeneral*.ttf")])
    if len(faces) < MIN_FACES:
        raise FileNotFoundError(
            f"The glyphs data set is drawn with the DejaVu and STIX General faces of the "
            f"matplotlib package, but {folder} holds {len(faces)} of them. Some Linux "
            f"distributions leave them out; `pip install --force-reinstall matplotlib` brings "
            f"them back."
        )
    return faces


def _png(pixels: bytes) -> bytes:
    buffer = io.BytesIO()
    image = Image.frombytes("L", (IMAGE_SIZE, IMAGE_SIZE), pixels).convert("RGB")
    image.save(buffer, "PNG")
    return buffer.getvalue()
