"""Names in tables and figures: every letter is seen, none is taken for markup."""

import re
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image
from tabulate import tabulate

from cgd_jax.reports import plots
from cgd_jax.reports.names import literal, markdown, shorten


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


@given(st.text(max_size=60), st.integers(1, 30))
def test_long_names_are_cut(name, length):
    whole, cut = literal(name), shorten(name, length)
    assert len(cut) <= length
    assert cut == whole or (cut.endswith("…") and whole.startswith(cut[:-1]))


def ink(path):
    """The columns of an image in which something is drawn."""
    return np.flatnonzero((np.asarray(Image.open(path).convert("L")) < 128).any(0))


def test_texts_in_figures_are_no_markup(tmp_path, drawn):
    names = ["$\\frac$", "a$b$_{c", "猫 🦄 \u1d81", r"two\nlines", "|x|", "_x", "%s{}", ""]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a letter that no font has
        with plots.figure(tmp_path / "a.png", 4, 3) as figure:
            axes = figure.subplots()
            axes.set_yticks(range(len(names)), names)
    assert set(names) <= {found.get_text() for found in drawn[0].findobj(Text)}
    widths = []
    for i, text in enumerate(("$x$", "x")):
        with plots.figure(tmp_path / f"{i}.png", 1, 1) as figure:
            figure.text(0.1, 0.5, text)
        widths.append(np.ptp(ink(tmp_path / f"{i}.png")))
    assert widths[0] > 2 * widths[1], "the signs around the letter are drawn"


def test_letters_come_from_the_font_that_has_them(tmp_path, monkeypatch):
    letter = "\u1d81"  # in STIX, which comes with Matplotlib; DejaVu lacks it
    shown = []
    for families in ((), ("No Such Font", "STIXGeneral")):
        monkeypatch.setattr(plots, "_FAMILIES", families)
        with plots.figure(tmp_path / "a.png", 1, 1) as figure:
            figure.text(0.1, 0.5, letter, fontsize=40)
        shown.append(np.asarray(Image.open(tmp_path / "a.png")))
    with plots.figure(tmp_path / "a.png", 1, 1) as figure:
        figure.text(0.1, 0.5, letter, fontsize=40, family="STIXGeneral")
    stix = np.asarray(Image.open(tmp_path / "a.png"))
    assert np.array_equal(shown[1], stix) and not np.array_equal(shown[0], stix)
