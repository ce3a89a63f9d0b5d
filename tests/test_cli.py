"""The command line: configs by name from any folder, commands and their flags, help."""

import sys
import time
from pathlib import Path

import pytest
from absl.flags import Error

from cgd_jax import __main__ as cli
from cgd_jax import config_files, flags
from cgd_jax.config import to_dict
from cgd_jax.runtime import console, files
from configs import glyphs

ROOT = Path(__file__).parents[1]


def parse(*arguments):
    argv = ["cgd_jax", *arguments]
    name, given = flags.parse(argv, cli.COMMANDS, cli.FLAGS)
    cli.check(name, given, argv)
    return given


@pytest.mark.parametrize("flag", [["--config=glyphs"], ["-config", "configs/glyphs.py"]])
@pytest.mark.parametrize("command", [[], ["train"], ["--mode=train"]])
def test_a_config_is_found_from_any_folder(flag, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse(*command, *flag).config.data.name == "glyphs"
    for change in ("--config.train.steps=7", "--train.steps=7"):
        given = parse(*command, *flag[:-1], flag[-1] + ":SMG", change)
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
    assert parse("--config=glyphs", "--seed=3").config.seed == 3


@pytest.mark.parametrize("name", ["glyph", "configs/glyph.py", "", ":SG", "configs", "../glyphs"])
def test_a_config_that_does_not_exist(name):
    with pytest.raises(Error, match="no such config or file; there are base, .*glyphs, "):
        parse(f"--config={name}")


def test_one_command_line_knows_nothing_of_the_one_before():
    assert parse("--config=glyphs", "--config.train.steps=7").config.train.steps == 7
    assert parse("--config=glyphs").config.train.steps == 1000
    assert parse("--mode=search", "--query=a", "--query=b").query == ["a", "b"]
    assert parse("--mode=search", "--query=c").query == ["c"]


def test_words_stand_for_flags(tmp_path):
    files.write_json(tmp_path / "config.json", to_dict(glyphs.get_config()))
    given = parse("explain", str(tmp_path), "--step=3", "a.png", "b.png")
    assert (given.workdir, given.step) == (str(tmp_path), 3)
    assert (given.query, given.match) == (["a.png"], "b.png")
    assert parse("search", "a.jpg", "--k=3", "b.jpg").query == ["a.jpg", "b.jpg"]
    assert parse("index", "photos").images == parse("serve", "photos").images == ["photos"]
    assert parse("serve").images is None
    with pytest.raises(Error, match="'c.png' is one word too many"):
        parse("explain", str(tmp_path), "a.png", "b.png", "c.png")


@pytest.mark.parametrize("command", [["eval", "RUN"], ["--mode=eval", "--workdir=RUN"]])
def test_every_option_of_eval_can_be_given_to_eval(command, tmp_path):
    config = glyphs.get_config()
    config.train.steps = 7
    files.write_json(tmp_path / "config.json", to_dict(config))
    command = [word.replace("RUN", str(tmp_path)) for word in command]
    given = parse(*command, "--eval.flip", "--config.eval.query_expansion=2")
    assert given.config.train.steps == 7 and given.config.eval.flip
    assert given.config.eval.query_expansion == 2


def test_a_study_brings_its_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in (["--mode=study", "--study=descriptors"], ["study", "descriptors"]):
        given = parse(*command)
        assert given.study == "descriptors" and given.config.data.name == "glyphs"


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["train", "--steps=3"], "there is no flag --steps; did you mean --train.steps=?"),
        (
            ["eval", "--steps=3"],
            "there is no flag --steps; did you mean --step= or --train.steps=?",
        ),
        (["serve", "--workdri=x"], "there is no flag --workdri; did you mean --workdir=?"),
        (["glyphs"], "there is no command 'glyphs', but train, eval, "),
        (["search", "a.jpg", "--k=abc"], "flag --k=abc: it must be a whole number."),
        (["eval", "--k=3"], "--k goes with `search` and `pairs`, not with `eval`."),
        (["index", "a", "--nothing"], "there is no flag --nothing; `index --help` lists"),
        (["study"], "say which study: auxiliary, "),
        (["index"], "say what to index"),
        (["search", "--duplicates", "--k=3"], "--crop and --k do not go with --duplicates."),
    ],
)
def test_mistakes_name_the_remedy(arguments, message):
    with pytest.raises(SystemExit) as end:
        cli.main(["cgd_jax", *arguments])
    assert str(end.value).startswith(f"error: {message}") and "\n" not in str(end.value)


HIDDEN = "a\x1b]0;b\x07\x9bc\r"


@pytest.mark.parametrize(
    "arguments",
    [
        [f"--{HIDDEN}=1"],
        [f"--config={HIDDEN}"],
        [f"--mode={HIDDEN}"],
        ["train", "--config=glyphs", f"--train.steps={HIDDEN}"],
        ["train", "--config=glyphs", f"--train.{HIDDEN}=1"],
        ["train", "--config=glyphs", f"--model.descriptors={HIDDEN}"],
        ["data", "--config=image_folder", f"--data.source={HIDDEN}"],
        ["eval", HIDDEN],
        ["study", HIDDEN],
        ["study", "descriptors", f"--seeds={HIDDEN}"],
        ["explain", "a", "b", "c", HIDDEN],
        ["search", HIDDEN, f"--index={HIDDEN}"],
        ["search", "a", f"--k={HIDDEN}"],
        ["search", "a", f"--crop={HIDDEN}"],
        ["index", HIDDEN, f"--index={HIDDEN}"],
        ["index", "a", f"--model={HIDDEN}", "--aspect=keep"],
        ["pairs", HIDDEN, HIDDEN],
        ["serve", f"--host={HIDDEN}"],
    ],
    ids=" ".join,
)
def test_no_control_character_of_an_argument_reaches_the_terminal(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(["cgd_jax", *arguments])
    assert str(end.value).startswith("error: ") and not console.CONTROL.search(str(end.value))


@pytest.mark.parametrize("flag", ["--help", "-h", "-help", "--helpfull"])
def test_help(flag, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    begin = time.monotonic()
    with pytest.raises(SystemExit) as end:
        parse(flag)
    assert not end.value.code and time.monotonic() - begin < 2
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for name, command in cli.COMMANDS.items():
        assert f"\n  {name} " in text and f"\n    cgd_jax {name} {command.usage}\n" in text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse(name, "--help")
    text, command = capsys.readouterr().out, cli.COMMANDS[name]
    assert max(map(len, text.splitlines())) <= 80
    takes, arguments = command.takes.split(), command.arguments.split()
    assert all(f"\n  --{flag}" in text for flag in (*takes, "workdir"))
    assert {*takes, *arguments} <= {"config", *cli.FLAGS}


def test_the_examples_of_help_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/glyphs").mkdir(parents=True)
    files.write_json(tmp_path / "runs/glyphs/config.json", to_dict(glyphs.get_config()))
    for name, command in cli.COMMANDS.items():
        parse(name, *command.usage.split())


def test_files_of_an_installed_package(tmp_path, monkeypatch):
    """Where configs/ lies within the package, and a clone is nowhere."""
    (tmp_path / "cgd_jax").mkdir()
    (tmp_path / "cgd_jax/configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr(config_files, "FOLDER", tmp_path / "cgd_jax/configs")
    monkeypatch.chdir(tmp_path)
    found = config_files.find("glyphs", config_files.FOLDER)
    assert found == config_files.find("configs/glyphs.py") == tmp_path / "cgd_jax/configs/glyphs.py"
