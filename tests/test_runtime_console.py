"""What a terminal shows, whatever it can show; log lines in place of progress bars."""

import io
import logging
import os
import subprocess
import sys

import pytest

from cgd_jax import __main__ as cli
from cgd_jax.runtime import console
from cgd_jax.runtime.errors import InputError


@pytest.mark.parametrize(
    "encoding, shown",
    [
        ("utf-8", "1 → 2 \\udcff"),
        ("ascii", "1 \\u2192 2 \\udcff"),
        ("cp1252", "1 \\u2192 2 \\udcff"),
    ],
)
def test_characters_that_a_terminal_does_not_have_are_escaped(monkeypatch, encoding, shown):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    console.log("1 → 2 \udcff")
    terminal.flush()
    assert terminal.buffer.getvalue().decode(encoding).rstrip() == shown


def test_control_characters_of_names_do_not_reach_a_terminal(capsys, monkeypatch):
    console.log("a\x1b[2Jb\rc\n\td\x9b e")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\rc\n\td\\x9b e\n"

    def refuse(*_):
        raise InputError("photo\x1b]0;title\a.jpg: not a file.")

    monkeypatch.setattr(cli, "parse", refuse)
    with pytest.raises(SystemExit, match=r"photo\\x1b\]0;title\\x07.jpg: not a file"):
        cli.main(["cgd_jax", "data"])


@pytest.mark.parametrize("is_terminal", [True, False])
def test_log_lines_break_at_spaces_on_a_terminal(is_terminal, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "30")
    logger = logging.getLogger("cgd_jax")
    before = logger.level, logger.propagate, logger.handlers
    text = "The embedding has collapsed:\n  train again with --config.model.center=mean-of-a-batch."
    try:
        console.show_log()
        logging.getLogger("cgd_jax.train").warning(text)
    finally:
        logger.level, logger.propagate, logger.handlers = before
    shown = terminal.getvalue().splitlines()
    assert " ".join(shown).split() == text.split()
    if is_terminal:
        text = text.replace("with ", "with\n")
    assert shown == text.splitlines()


def test_progress_without_a_terminal_is_a_line_now_and_then(caplog):
    with caplog.at_level(logging.INFO):
        with console.progress(50, "resizing images", log_every=0) as bar:
            for _ in range(3):
                bar.update(10)
        with console.progress(50, "reading labels", log_every=1000) as bar:
            bar.update(50)
        with console.progress(1, "unpacking a\x1b[2J.zip", log_every=0) as bar:
            assert bar.desc == "unpacking a\\x1b[2J.zip"
    lines = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("resizing images: 20 of 50 in 00:00, ") for line in lines)
    assert [line.partition(" in ")[0] for line in lines if "labels" in line] == [
        "reading labels: 50 of 50"
    ]


def test_a_terminal_that_reports_no_size_has_a_bar():
    pty = pytest.importorskip("pty", reason="there are no such terminals on Windows")
    main, terminal = pty.openpty()  # of 0 columns and 0 rows
    code = "from cgd_jax.reports.history import Progress as P\nwith P(0, 2) as bar: bar.refresh()"
    with open(main, "rb", 0) as shown:
        subprocess.run([sys.executable, "-c", code], stderr=terminal, check=True)
        assert b"training:   0%" in shown.read(1000)
    os.close(terminal)


@pytest.mark.parametrize(
    "seconds, shown",
    [
        *((0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s")),
        *((3599.4, "59 min 59 s"), (3599.6, "1 h 00 min"), (90_000, "25 h 00 min")),
    ],
)
def test_durations(seconds, shown):
    assert console.duration(seconds) == shown


@pytest.mark.parametrize(
    "number, shown",
    [
        *((0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (10_612, "10.6 kB"), (57.47e9, "57.5 GB")),
        *((999_499, "999 kB"), (999_501, "1 MB"), (3.5e15, "3.5e+03 TB")),
    ],
)
def test_quantities(number, shown):
    assert console.quantity(number, "B") == shown


def test_a_bar_that_is_for_a_terminal_only(capsys, caplog):
    with caplog.at_level(logging.INFO):
        assert list(console.counted("abc", "reading", "letter")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "") and not caplog.records
