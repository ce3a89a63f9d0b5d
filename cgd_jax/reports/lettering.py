"""Text in pictures: names are drawn as they are, whatever letters they are made of.

Pillow has one font a text, and Matplotlib knows markup; letters that a font lacks are boxes in
both. Here they come from whatever font is installed that has them, or are spelled out.
"""

import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import accumulate, groupby

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import ImageDraw, ImageFont

from cgd_jax.reports.names import escape, literal

__all__ = ["drawable", "families", "width", "write"]

FAMILY = "DejaVu Sans"  # comes with Matplotlib


def drawable(name: object, length: int | None = None) -> str:
    """Returns a name as it can be drawn, whatever fonts are installed.

    Args:
      name: of anything. Symbols that no font has become their names, such as [unicorn face],
        and letters their escapes.
      length: in letters of usual width; a longer name is cut and ends in "…".
    """
    shown = [_visible(letter) for letter in literal(name)]
    if length is not None and sum(map(_breadth, shown)) > length:
        ends = accumulate(map(_breadth, shown))
        shown = [part for part, end in zip(shown, ends, strict=True) if end < length] + ["…"]
    return "".join(shown)


def families(*texts: str) -> list[str]:
    """Returns the font families that Matplotlib needs to draw texts, each where the first fails."""
    fonts = (_font_of(letter) for text in texts for letter in text)
    return list(dict.fromkeys([FAMILY, *(font.name for font in fonts if font)]))


def width(text: str, size: int) -> float:
    """Returns how many pixels wide `write` draws a text."""
    return sum(font.getlength(part) for font, part in _parts(text, size))


def write(
    canvas: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, color: str
) -> None:
    """Draws a text that is `drawable`.

    Args:
      canvas: to draw on.
      place: x and y of its left end on the baseline, in pixels.
      text: of one line.
      size: height of the font, in pixels.
      color: of the letters.
    """
    x, y = place
    for font, part in _parts(text, size):
        canvas.text((x, y), part, color, font, anchor="ls")
        x += font.getlength(part)


def _parts(text: str, size: int) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
    """Yields pieces of a text, each with the one font that it is drawn in."""
    for entry, letters in groupby(text, _font_of):
        path = (entry or _usual_font()[0]).fname
        font = ImageFont.truetype(path, size)
        yield font, "".join(letters)


def _visible(letter: str) -> str:
    if _font_of(letter):
        return letter
    is_symbol = unicodedata.category(letter).startswith("S")
    name = unicodedata.name(letter, "") if is_symbol else ""
    return f"[{name.lower()}]" if name else escape(letter)


def _breadth(part: str) -> int:
    return len(part) + (unicodedata.east_asian_width(part[0]) in "WF")


def _font_of(letter: str) -> font_manager.FontEntry | None:
    """Returns an installed font that has a letter, if possible the usual one; None if none has."""
    usual, letters = _usual_font()
    return usual if ord(letter) in letters else _other_fonts().get(ord(letter))


@cache
def _usual_font() -> tuple[font_manager.FontEntry, set[int]]:
    path = font_manager.findfont(FAMILY)
    return font_manager.FontEntry(fname=path, name=FAMILY), set(FT2Font(path).get_charmap())


@cache
def _other_fonts() -> dict[int, font_manager.FontEntry]:
    """Returns the fonts that letters are drawn with that the usual one lacks."""
    found = {}
    for entry in sorted(
        font_manager.fontManager.ttflist, key=lambda entry: ("Sans" not in entry.name, entry.name)
    ):
        upright = entry.style == "normal" and entry.weight == 400
        # Boxes for all letters, and bitmaps of one size.
        if not upright or any(word in entry.name for word in ("Last Resort", "Color Emoji")):
            continue
        try:
            font = FT2Font(entry.fname)
            # Of several files with one name, Matplotlib draws with the one that it finds by it.
            if font_manager.findfont(entry.name, fallback_to_default=False) == entry.fname:
                for letter in font.get_charmap():
                    found.setdefault(letter, entry)
        except (OSError, RuntimeError, ValueError):
            continue  # a damaged file is no reason to lose the picture
    return found
