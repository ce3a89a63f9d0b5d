"""Names in tables and pictures: every letter is seen, none is taken for markup."""

import re
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from tabulate import tabulate

from cgd_jax.reports import lettering, plots
from cgd_jax.reports.names import literal, markdown


@pytest.fixture
def only_dejavu(monkeypatch):
    """A machine without other fonts."""
    monkeypatch.setattr(lettering, "_other_fonts", dict)


@pytest.mark.parametrize(
    "name,shown",
    [
        ("plain name_1 (2)", "plain name_1 (2)"),
        ("two\nlines\tand\x1b[31mred", r"two\nlines\tand\x1b[31mred"),
        ("a\u2028b\u202ec\x00", r"a\u2028b\u202ec\x00"),
        ("caf\udce9", r"caf\udce9"),  # a file name that is not UTF-8
        ("u\u0308ber", "über"),  # as macOS writes it
        ("می\u200cخواهم 👩\u200d🔬", "می\u200cخواهم 👩\u200d🔬"),
        (512, "512"),
    ],
)
def test_a_name_is_one_visible_line(name, shown):
    assert literal(name) == shown


@given(st.text())
def test_markdown_is_the_name_escaped(name):
    found = markdown(name)
    assert re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", found) == literal(name)  # CommonMark, 2.4
    assert not re.search(r"(?<!\\)(?:\\\\)*[|*<`$\[]", found)
    table = tabulate([[found, "1"]], ["name", "n"], "github", disable_numparse=True)
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in table.splitlines())


def test_markdown_stays_readable():
    assert markdown("model_state, R@1 (95 %) - 3 & 4") == "model_state, R@1 (95 %) - 3 & 4"
    assert markdown("_a_b_ &amp; :cat:") == r"\_a_b\_ \&amp; \:cat:"


def test_letters_that_no_font_has_are_spelled_out(only_dejavu):
    assert lettering.drawable("Über 猫 🦄 $x_1$") == r"Über \u732b [unicorn face] $x_1$"
    assert lettering.drawable("a\nb") == r"a\nb"


def test_letters_come_from_the_font_that_has_them():
    letter = "\u1d81"  # in STIX, which comes with Matplotlib; DejaVu lacks it
    entry = lettering._font_of(letter)
    assert lettering.drawable(letter) == letter and entry.name != lettering.FAMILY
    assert lettering.families("a", f"b{letter}") == [lettering.FAMILY, entry.name]
    drawn, expected = Image.new("L", (90, 40)), Image.new("L", (90, 40))
    lettering.write(ImageDraw.Draw(drawn), (5, 30), f"a{letter}", 24, "white")
    canvas, x = ImageDraw.Draw(expected), 5
    for part, path in [("a", font_manager.findfont(lettering.FAMILY)), (letter, entry.fname)]:
        font = ImageFont.truetype(path, 24)
        canvas.text((x, 30), part, "white", font, anchor="ls")
        x += font.getlength(part)
    np.testing.assert_array_equal(drawn, expected)
    assert lettering.width(f"a{letter}", 24) == x - 5


def test_fonts_that_cannot_be_used_are_passed_over(monkeypatch, tmp_path):
    damaged = tmp_path / "damaged.ttf"
    damaged.write_bytes(b"no font")
    entries = [
        font_manager.FontEntry(fname=str(damaged), name="A Sans", style="normal", weight=400),
        *font_manager.fontManager.ttflist,
    ]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", entries)
    fonts = lettering._other_fonts.__wrapped__()
    assert 0x1D81 in fonts and "Last Resort" not in {entry.name for entry in fonts.values()}


@given(st.text(max_size=60), st.integers(1, 30))
def test_long_names_are_cut(name, length):
    whole, cut = lettering.drawable(name), lettering.drawable(name, length)
    assert all(map(lettering._font_of, whole))
    assert len(cut) <= length
    assert cut == whole or (cut.endswith("…") and whole.startswith(cut[:-1]))


ODD = ["$\\frac$", "a$b$_{c", "猫 🦄 \u1d81", "two\nlines", "|x|", "_x", "%s{}", ""]


def test_pictures_take_names_as_they_are(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a letter that no font has
        with plots.picture(tmp_path / "a.png", 4, 3, map(lettering.drawable, ODD)) as figure:
            axes = figure.subplots()
            axes.set_title("\n".join(map(lettering.drawable, ODD)))
            axes.set_yticks(range(len(ODD)), map(lettering.drawable, ODD))
    assert Image.open(tmp_path / "a.png").size == (480, 360)
