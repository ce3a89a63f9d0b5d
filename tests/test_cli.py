"""The command line: configs by name from any folder, help."""

import sys
import time
from pathlib import Path

import pytest

from cgd_jax import cli, config_files

ROOT = Path(__file__).parents[1]


def parse(*arguments):
    return cli.parse_flags(["cgd_jax", *arguments])


@pytest.mark.parametrize("flag", [["--config=glyphs"], ["-config", "configs/glyphs.py"]])
def test_a_config_is_found_from_any_folder(flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse(*flag).config.data.name == "glyphs"
    given = parse(*flag[:-1], flag[-1] + ":SMG", "--config.train.steps=7")
    assert given.config.model.descriptors == "SMG" and given.config.train.steps == 7


def test_a_config_of_ones_own(tmp_path, monkeypatch):
    """It may change one of the project's, from a folder where there is nothing else."""
    (tmp_path / "glyphs.py").write_text(
        "from configs import cub200\n"
        "def get_config():\n"
        "    config = cub200.get_config()\n"
        "    config.seed = 5\n"
        "    return config\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "configs", raising=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry) != ROOT])
    given = parse("--config=glyphs.py")
    assert given.config.data.name == "cub200" and given.config.seed == 5
    assert parse("--config=glyphs").config.data.name == "glyphs"


@pytest.mark.parametrize("name", ["glyph", "configs/glyph.py", "", ":SG", "configs", "../glyphs"])
def test_a_config_that_does_not_exist(name):
    with pytest.raises(SystemExit, match="no such config or file; there are base, .*glyphs, "):
        parse(f"--config={name}")


def test_one_command_line_knows_nothing_of_the_one_before():
    assert parse("--config=glyphs", "--config.train.steps=7").config.train.steps == 7
    assert parse("--config=glyphs").config.train.steps == 1000
    assert parse("--mode=search", "--query=a", "--query=b").query == ["a", "b"]
    assert parse("--mode=search", "--query=c").query == ["c"]


def test_a_study_brings_its_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = parse("--mode=study", "--study=descriptors")
    assert given.config.data.name == "glyphs"


@pytest.mark.parametrize("flag", ["--help", "-h", "-help", "--helpfull"])
def test_help(flag, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    begin = time.monotonic()
    with pytest.raises(SystemExit) as end:
        parse(flag)
    assert not end.value.code and time.monotonic() - begin < 2
    text = capsys.readouterr().out
    modes = text.partition("Flags of")[0]
    assert max(map(len, text.splitlines())) <= 80
    for name, mode in cli.MODES.items():
        assert f"\n  {name} " in modes and f"\n    cgd_jax {mode.example}\n" in modes
    flags = [name for name in cli.define_flags([]) if name != "config"]
    assert all(text.count(f"\n  --{name}") >= 1 for name in flags)
    assert "repeat this option" not in text and ">:" not in text
    assert "glyphs, grocery" in text and "descriptors, dimension" in " ".join(text.split())


def test_the_examples_of_help_are_understood():
    for mode in cli.MODES.values():
        parse(*mode.example.split())


def test_every_flag_has_a_value_in_help_and_a_mode():
    given = cli.define_flags([])
    assert set(cli.VALUES) <= set(given)
    assert {flag for mode in cli.MODES.values() for flag in mode.takes} <= set(given)
    texts = [name for name in given if given[name].flag_type() in ("string", "comma separated")]
    assert set(texts) - set(cli.VALUES) == set()


def test_files_of_an_installed_package(tmp_path, monkeypatch):
    """Where configs/ lies within the package, and a clone is nowhere."""
    (tmp_path / "cgd_jax").mkdir()
    (tmp_path / "cgd_jax/configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr(config_files, "FOLDER", tmp_path / "cgd_jax/configs")
    monkeypatch.chdir(tmp_path)
    found = config_files.find("glyphs", config_files.FOLDER)
    assert found == config_files.find("configs/glyphs.py") == tmp_path / "cgd_jax/configs/glyphs.py"
