"""How a command line is read: commands, their flags, the words that stand for flags, --help."""

import difflib
import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

from cgd_jax import config_files, study_files
from cgd_jax.runtime import buckets, console
from cgd_jax.runtime.errors import UserError

CONFIG = (
    f"The experiment: {config_files.listed()}, or a file of your own; behind a colon the argument "
    f"that it takes, as in glyphs:SMG. --KEY=VALUE changes a value, as in --train.steps=500; "
    f"configs/base.py explains every key."
)
MANY = ("query", "images", "together", "values")  # flags that may be given several times
# How absl defines a flag, by what --help calls its value; others are texts.
KINDS: dict[str, Callable[..., Any]] = {
    "": flags.DEFINE_bool,
    "NUMBER": flags.DEFINE_integer,
    "COSINE": flags.DEFINE_float,
    "EXPONENT": flags.DEFINE_float,
    "NUMBER,NUMBER": flags.DEFINE_list,
    "NAME,NAME": flags.DEFINE_list,
}
PARTS = "data|augment|model|loss|optimizer|train|eval"
OF_ALL = ["mode", "workdir", "distributed", "coordinator", "num_processes", "process_id"]
DIVIDED = ("train", "eval", "index")  # several processes share the work; --help of others is short


class Command(NamedTuple):
    """What can be done: a word behind the program's name, or the value of --mode."""

    what: str  # it does
    usage: str  # an example, behind its name
    takes: str  # names of flags of its own
    arguments: str = ""  # those that words without dashes fill, in their order
    extra: str = "train"  # of pyproject.toml, with the packages it needs


class Flag(NamedTuple):
    what: str  # it is
    value: str = ""  # what --help calls its value, see `KINDS`; without it, a switch
    default: Any = None
    options: tuple = ()  # names to choose from, or the bounds of a number


def parse(
    argv: list[str], commands: Mapping[str, Command], known: Mapping[str, Flag]
) -> tuple[str, flags.FlagValues]:
    """Parses a command line: a command is its first word, or the value of --mode.

    Returns the name of the command; its flags, of which `config` is a `ConfigDict` or None. Raises
    SystemExit after --help was shown; flags.Error says what is wrong.
    """
    argv, name = list(argv), ""
    if len(argv) > 1 and argv[1] in commands:
        name = argv.pop(1)
    elif len(argv) > 1 and argv[1][:1] != "-" and not any("mode" in word for word in argv):
        sys.exit(f"error: there is no command {argv[1]!r}, but {', '.join(commands)}.")
    if any(re.fullmatch("-h|--?help(full|short)?", argument) for argument in argv[1:]):
        print(help_text(program(argv), commands, known, name))
        sys.exit()
    config_files.make_importable()
    try:
        if not name:
            only_mode = define(known, ["mode"])
            only_mode(argv, known_only=True)
            name = only_mode.mode
        return name, parse_command(name, commands[name], known, argv)
    except flags.UnrecognizedFlagError as error:
        raise flags.Error(unknown_flag(error.flagname, name, commands)) from error
    except flags.Error as error:
        text = re.sub(r"invalid literal for int.*", "it must be a whole number.", str(error))
        raise flags.Error(text) from error


def parse_command(
    name: str, command: Command, known: Mapping[str, Flag], argv: list[str]
) -> flags.FlagValues:
    """Parses the flags of one command, and the words that stand for some of them."""
    given = define(known, [flag for flag in command.takes.split() if flag != "config"] + OF_ALL)
    given.set_gnu_getopt(True)  # flags may stand behind words
    argv = [
        re.sub(rf"^--?(?=({PARTS})\.|(no)?(seed|profile_steps)\b)", "--config.", a) for a in argv
    ]
    words = given(argv, known_only=True)
    if "config" in command.takes.split():
        words = parse_config(name, command, given, words)
    elif unknown := [word for word in words[1:] if word.startswith("-")]:
        raise flags.UnrecognizedFlagError(unknown[0].lstrip("-").partition("=")[0])
    fill(given, command.arguments.split(), words[1:])
    return given


def parse_config(
    name: str, command: Command, given: flags.FlagValues, argv: list[str]
) -> list[str]:
    """Defines and parses --config and what it overrides; returns the words that are left."""
    named = any(re.match("--?config(=|$)", argument) for argument in argv)
    word = next((word for word in argv[1:] if word[0] != "-"), "")
    chosen = (given.study or word) if name == "study" else ""
    if chosen and not named and not chosen.endswith(".csv"):
        argv = [argv[0], f"--config={study_files.load(chosen).config}", *argv[1:]]
    argv = with_config_file(argv)
    run = "workdir" in command.arguments.split() and not named and (given.workdir or word)
    folder = buckets.local(run) if run else ""
    try:
        if folder:
            from cgd_jax.workdir import read_config

            of_run = read_config(folder)
            config_flags.DEFINE_config_dict("config", of_run, flag_values=given, sys_argv=argv)
        else:
            config_flags.DEFINE_config_file("config", flag_values=given, sys_argv=argv)
        words = given(argv)
        if given.config is not None:
            given.config.to_dict()  # a config file that cannot be loaded is reported on first use
        return words
    except (flags.Error, UserError, OSError):
        raise
    except Exception as error:  # whatever the user's file raises
        raise flags.Error(explained_config(error, argv)) from error


def fill(given: flags.FlagValues, names: list[str], words: list[str]) -> None:
    """Gives words without dashes to the flags that they stand for; the last may take several."""
    left = [name for name in names if given[name].value is None]
    for word in words:
        if not left:
            raise flags.Error(
                f"{word!r} is one word too many; flags look like --config=glyphs, and --help "
                f"lists them."
            )
        flag = given[left[0]]
        flag.value = [*(flag.value or []), word] if left[0] in MANY else word
        if len(left) > 1 or left[0] not in MANY:
            left.pop(0)


def with_config_file(argv: list[str]) -> list[str]:
    """Returns the command line with the file of a config in place of its name."""
    argv = list(argv)
    for i, argument in enumerate(argv):
        if match := re.fullmatch(r"(--?config=)(.*)", argument):
            flag, config = match.groups()
        elif i and re.fullmatch(r"--?config", argv[i - 1]):
            flag, config = "", argument
        else:
            continue
        name, colon, rest = config.partition(":")
        path = config_files.find(name)
        if path is None and not Path(name).is_file():
            raise flags.Error(
                f"--config={name}: there is no such config or file; there are "
                f"{config_files.listed()}, or give the path of a file of your own."
            )
        argv[i] = f"{flag}{path or name}{colon}{rest}"
    return argv


def define(known: Mapping[str, Flag], names: list[str]) -> flags.FlagValues:
    """Returns flags that are not parsed yet."""
    given = flags.FlagValues()
    for name in names:
        what, value, default, options = known[name]
        if value == "NAME" and options:
            flags.DEFINE_enum(name, default, list(options), what, flag_values=given)
            continue
        define_one = KINDS.get(value, flags.DEFINE_string)
        define_one = flags.DEFINE_multi_string if name in MANY else define_one
        define_one(name, default if value else False, what, *options, flag_values=given)
    return given


def unknown_flag(flag: str, name: str, commands: Mapping[str, Command]) -> str:
    """Returns what is wrong with a flag that a command does not have, and what would be right."""
    takers = [f"`{other}`" for other, command in commands.items() if flag in command.takes.split()]
    if takers:
        return f"--{flag} goes with {' and '.join(takers)}, not with `{name}`."
    takes = commands[name].takes.split()
    alike = [f"--{other}=" for other in difflib.get_close_matches(flag, takes + OF_ALL, cutoff=0.8)]
    if "config" in takes:
        from flax.traverse_util import flatten_dict

        keys = flatten_dict(config_files.base_config().to_dict(), sep=".")
        alike += [f"--{key}=" for key in keys if key.rpartition(".")[2] == flag]
    if alike:
        return f"there is no flag --{flag}; did you mean {' or '.join(alike)}?"
    return f"there is no flag --{flag}; `{name} --help` lists those that there are."


def explained_config(error: Exception, argv: list[str]) -> str:
    """Returns what is wrong with a config file, or with what is changed of it."""
    text: Any = error
    while isinstance(text, AttributeError | KeyError) and text.args:  # one wraps the other
        text = text.args[0]
    text = " ".join(str(text).split())
    if absent := re.match(r"'(\w+)'", text):  # so ml_collections names a key
        for flag in (argument.partition("=")[0] for argument in argv):
            if flag.startswith("--config.") and absent[1] in flag.split("."):
                return (
                    f"{flag}: the config has no key {absent[0]}; configs/base.py explains those "
                    f"it has.{text[absent.end() :]}"
                )
    named = re.search(r"^--?config[=\n]([^:\n]*)", "\n".join(argv), re.MULTILINE)
    return f"--config={named[1] if named else ''} cannot be used: {type(error).__name__}: {text}"


def help_text(
    program: str, commands: Mapping[str, Command], known: Mapping[str, Flag], name: str
) -> str:
    """Returns what --help shows: the commands with examples; of one command, its flags."""
    width = min(console.columns(), 100)

    def wrapped(first: str, text: str) -> list[str]:
        return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=" " * len(first))

    if not name:
        lines = ["Image retrieval with combined global descriptors.", "", "Commands:"]
        for name, command in commands.items():
            lines += ["", *wrapped(f"  {name:9}", command.what)]
            lines += [f"    {program} {name} {command.usage}"]
        return "\n".join([*lines, "", f"{program} COMMAND --help shows its flags."])
    command = commands[name]
    lines = wrapped(f"{name}: ", command.what)
    lines += ["", f"  {program} {name} {command.usage}", "", "Flags:"]
    for flag in command.takes.split() + OF_ALL[1 : None if name in DIVIDED else 2]:
        what, value = (CONFIG, "NAME") if flag == "config" else known[flag][:2]
        lines += [f"  --{flag}{'=' * bool(value)}{value}", *wrapped(" " * 8, what)]
    return "\n".join(lines)


def program(argv: list[str]) -> str:
    """Returns how the user called this program, in short."""
    name = Path(argv[0]).name
    return {"main.py": "python main.py", "__main__.py": "python -m cgd_jax"}.get(name, name)
