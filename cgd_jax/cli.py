"""The command line: `cgd_jax train --config=glyphs`, in a clone `python main.py --config=glyphs`.

`COMMANDS` says what there is and which flags each command takes; those of search stand in
`search_cli`. A command is the first word, or the value of --mode; without either it is train.
"""

import os
import re
import signal
import sys
import textwrap
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from cgd_jax import config_files, search_cli
from cgd_jax.config import flatten
from cgd_jax.flags import Command, Flag, define
from cgd_jax.runtime import compiled, console, interrupts, memory, packages
from cgd_jax.runtime.errors import UserError

# Whatever imports JAX is imported where it is needed: --help, and an index that is up to date,
# end before it would be there.

__all__ = ["main"]

COMMANDS = {
    "train": Command(
        "trains and evaluates, or goes on where it was stopped", "--config=glyphs", ("config",)
    ),
    "eval": Command(
        "evaluates a checkpoint again, with other options if you like",
        "runs/glyphs --eval.flip",
        ("config", "step"),
        ("workdir",),
    ),
    "data": Command(
        "builds and counts a data set, draws a batch as the network sees it",
        "--config=image_folder --data.source=IMAGES",
        ("config",),
    ),
    "explain": Command(
        "draws which regions make two images alike",
        "runs/glyphs A.png B.png",
        ("config", "step", "query", "match"),
        ("workdir", "query", "match"),
    ),
    "export": Command(
        "writes the network into files to take away",
        "runs/glyphs",
        ("config", "step", "push_to_hub"),
        ("workdir",),
    ),
    "study": Command(
        "trains variants with several seeds and compares them",
        "descriptors --variants=S,SG --dry_run",
        ("config", "study", "variants", "seeds", "jobs", "dry_run"),
        ("study",),
    ),
    **search_cli.COMMANDS,
}
OF_ALL = ("mode", "workdir", "distributed", "coordinator", "num_processes", "process_id")
FLAGS = {
    "mode": Flag(
        flags.DEFINE_enum,
        "The command, where it is not the first word.",
        "NAME",
        "train",
        tuple(COMMANDS),
    ),
    "workdir": Flag(
        flags.DEFINE_string,
        "The folder of the run; else runs/CONFIG, or runs/studies/CONFIG.",
        "FOLDER",
    ),
    "step": Flag(flags.DEFINE_integer, "The checkpoint; else the one with the best R@1."),
    "match": Flag(flags.DEFINE_string, "The image that --query is compared with.", "FILE"),
    "push_to_hub": Flag(
        flags.DEFINE_string, "A Hugging Face repository to upload to.", "OWNER/NAME"
    ),
    "study": Flag(
        flags.DEFINE_string,
        f"The study: {config_files.listed(config_files.FOLDER / 'studies')}, or a file of your "
        f"own.",
        "NAME",
    ),
    "variants": Flag(flags.DEFINE_list, "Some of the study's, separated by commas.", "NAME,NAME"),
    "seeds": Flag(flags.DEFINE_list, "Others than the study's: 0,1,2.", "NUMBER,NUMBER"),
    "jobs": Flag(flags.DEFINE_integer, "Runs that share a CPU; else 1."),
    "dry_run": Flag(flags.DEFINE_bool, "Lists the runs and their commands, and ends.", "", False),
    "distributed": Flag(
        flags.DEFINE_bool,
        "Several processes, as SLURM, Open MPI or the TPU pod has started them.",
        "",
        False,
    ),
    "coordinator": Flag(
        flags.DEFINE_string,
        "Several processes, started by hand: where the first one is.",
        "HOST:PORT",
    ),
    "num_processes": Flag(flags.DEFINE_integer, "With --coordinator: how many."),
    "process_id": Flag(flags.DEFINE_integer, "With --coordinator: which one, from 0."),
    **search_cli.FLAGS,
}
CONFIG = (
    f"The experiment: {config_files.listed()}, or a file of your own; behind a colon the argument "
    f"that it takes, as in glyphs:SMG. --KEY=VALUE changes a value, as in --train.steps=500; "
    f"configs/base.py explains every key."
)
MANY = ("query", "images")  # flags that may be given several times
PARTS = "data|augment|model|loss|optimizer|train|eval"


def program(argv: list[str]) -> str:
    """Returns how the user called this program, in short."""
    name = Path(argv[0]).name
    return {"main.py": "python main.py", "__main__.py": "python -m cgd_jax"}.get(name, name)


def help_text(argv: list[str], name: str = "") -> str:
    """Returns what --help shows: the commands with examples; of one command, its flags."""
    width = min(console.columns(), 100)

    def wrapped(first: str, text: str) -> list[str]:
        return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=" " * len(first))

    if not name:
        lines = ["Image retrieval with combined global descriptors.", "", "Commands:"]
        for name, command in COMMANDS.items():
            lines += ["", *wrapped(f"  {name:9}", command.what)]
            lines += [f"    {program(argv)} {name} {command.usage}"]
        return "\n".join([*lines, "", f"{program(argv)} COMMAND --help shows its flags."])
    command = COMMANDS[name]
    lines = wrapped(f"{name}: ", command.what)
    lines += ["", f"  {program(argv)} {name} {command.usage}", "", "Flags:"]
    for flag in [*command.takes, *(flag for flag in OF_ALL if flag != "mode")]:
        what, value = (CONFIG, "NAME") if flag == "config" else FLAGS[flag][1:3]
        lines += [f"  --{flag}{'=' * bool(value)}{value}", *wrapped(" " * 8, what)]
    return "\n".join(lines)


def parse(argv: list[str]) -> tuple[str, flags.FlagValues]:
    """Parses the command line.

    Returns:
      The name of the command; its flags, of which `config` is a `ConfigDict` or None.

    Raises:
      SystemExit: --help was shown, or a line says what is wrong.
    """
    argv, name = list(argv), ""
    if len(argv) > 1 and argv[1] in COMMANDS:
        name = argv.pop(1)
    if any(re.fullmatch("-h|--?help(full|short)?", argument) for argument in argv[1:]):
        print(help_text(argv, name))
        sys.exit()
    config_files.make_importable()
    try:
        if not name:
            only_mode = define(FLAGS, ("mode",))
            only_mode(argv, known_only=True)
            name = only_mode.mode
        given = parse_command(name, argv)
        check(name, given, argv)
        return name, given
    except flags.Error as error:
        sys.exit(f"error: {explained(error, name)}")


def parse_command(name: str, argv: list[str]) -> flags.FlagValues:
    """Parses the flags of one command, and the words that stand for some of them."""
    command = COMMANDS[name]
    own = tuple(flag for flag in command.takes if flag != "config")
    given = define(FLAGS, (*own, *OF_ALL))
    given.set_gnu_getopt(True)  # flags may stand behind words
    argv = [
        re.sub(rf"^--?(?=({PARTS})\.|(no)?(seed|profile_steps)\b)", "--config.", a) for a in argv
    ]
    words = given(argv, known_only=True)
    if "config" in command.takes:
        words = parse_config(name, given, words)
    elif unknown := [word for word in words[1:] if word.startswith("-")]:
        raise flags.UnrecognizedFlagError(unknown[0].lstrip("-").partition("=")[0])
    fill(given, command.arguments, words[1:])
    return given


def parse_config(name: str, given: flags.FlagValues, argv: list[str]) -> list[str]:
    """Defines and parses --config and what it overrides; returns the words that are left."""
    named = any(re.match("--?config(=|$)", argument) for argument in argv)
    word = next((word for word in argv[1:] if word[0] != "-"), "")
    if name == "study" and not named and (given.study or word):
        packages.require("study", "train", "jax", "flax", "optax")
        from cgd_jax.studies import study

        argv = [argv[0], f"--config={study.load(given.study or word).config}", *argv[1:]]
    argv = with_config_file(argv)
    try:
        if "workdir" in COMMANDS[name].arguments and not named and (given.workdir or word):
            from cgd_jax.workdir import read_config

            of_run = read_config(given.workdir or word)
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
        sys.exit(f"error: {explained_config(error, argv)}")


def fill(given: flags.FlagValues, names: tuple[str, ...], words: list[str]) -> None:
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


def explained(error: flags.Error, name: str) -> str:
    """Returns what is wrong with a flag, and what would be right."""
    if not isinstance(error, flags.UnrecognizedFlagError):
        return re.sub(r"invalid literal for int.*", "it must be a whole number.", str(error))
    flag = error.flagname
    takers = [f"`{other}`" for other, command in COMMANDS.items() if flag in command.takes]
    keys = [
        key
        for key in flatten(config_files.base_config().to_dict())
        if key.rpartition(".")[2] == flag
    ]
    if takers:
        return f"--{flag} goes with {' and '.join(takers)}, not with `{name}`."
    if keys and "config" in COMMANDS[name].takes:
        return f"there is no flag --{flag}; did you mean {' or '.join(f'--{k}=' for k in keys)}?"
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


def check(name: str, given: flags.FlagValues, argv: list[str]) -> None:
    """Ends with one line about flags that are missing or do not go together."""
    if [given.coordinator, given.num_processes, given.process_id].count(None) not in (0, 3):
        raise flags.Error("--coordinator, --num_processes and --process_id go together.")
    if name in search_cli.COMMANDS:
        return search_cli.check(name, given)
    if name == "study" and not given.study:
        raise flags.Error(
            f"say which study: {config_files.listed(config_files.FOLDER / 'studies')}, or a file "
            f"of your own."
        )
    if name == "study" and not all(seed.isdigit() for seed in given.seeds or []):
        raise flags.Error(f"--seeds={','.join(given.seeds)}: give whole numbers such as 0,1,2.")
    if name == "explain" and (len(given.query or []) > 1 or bool(given.query) != bool(given.match)):
        raise flags.Error("--query and --match go together: the two images to compare.")
    if not given.config and not given.workdir:
        raise flags.Error(
            f"say what to run: {program(argv)} --config=glyphs, for example; --help lists what "
            f"there is."
        )


def run(name: str, given: flags.FlagValues) -> None:
    """Does what a command says."""
    if name in search_cli.COMMANDS:
        return search_cli.run(name, given)
    from cgd_jax import evaluate, explain, export, inspect_data, train
    from cgd_jax.studies import runner, study
    from cgd_jax.workdir import default_workdir

    file = (
        ""
        if given.workdir and name != "study"
        else config_flags.get_config_filename(given["config"])
    )
    workdir = given.workdir or default_workdir(file, "runs/studies" if name == "study" else "runs")
    match name:
        case "train":
            # Until training takes over, SIGTERM is like Ctrl-C: nothing is lost yet.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            train.train_and_evaluate(given.config, workdir)
        case "data":
            inspect_data.show_data(given.config, workdir)
        case "eval":
            evaluate.evaluate_run(workdir, given.step, given.config)
        case "explain":
            query = (given.query or [None])[0]
            pictures = explain.explain_run(workdir, given.step, query, given.match)
            console.log(f"Look at {' and '.join(map(str, pictures))}.")
        case "export":
            folder = export.export_run(workdir, given.step)
            console.log(f"{folder} holds the network; its README.md says how to open it.")
            if given.push_to_hub:
                console.log(f"Uploaded to {export.push_to_hub(folder, given.push_to_hub)}")
        case "study":
            chosen = study.load(given.study)
            changed = config_flags.get_override_values(given["config"])
            seeds = given.seeds and list(map(int, given.seeds))
            runs = study.plan(chosen, given.config, changed, workdir, given.variants, seeds)
            clone = config_files.FOLDER.parent / "main.py"
            command = [sys.executable, *([str(clone)] if clone.exists() else ["-m", "cgd_jax"])]
            command += [f"--config={file}"]
            command += [f"--config.{key}={value}" for key, value in changed.items()]
            runner.run_study(chosen, runs, command, workdir, given.jobs, given.dry_run)


def main(argv: list[str]) -> None:
    """Does what a command line says.

    Args:
      argv: the program and its arguments, as in `sys.argv`.

    Raises:
      SystemExit: With a message, what is wrong; or with a status.
    """
    # Errors reach the user as exceptions; what libraries log beside them is noise.
    logging.set_verbosity(logging.FATAL)
    name = "train"
    try:
        name, given = parse(argv)
        if not getattr(given, "json", False):
            console.show_log()
        memory.keep_freed_memory()
        memory.collect_garbage_rarely()
        compiled.keep_compiled()
        if given.distributed or given.coordinator:
            from cgd_jax.runtime import processes

            processes.start(given.coordinator, given.num_processes, given.process_id)
        run(name, given)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, as behind `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ModuleNotFoundError as error:
        ours = (error.name or "cgd_jax").startswith("cgd_jax") or "pip install" in str(error)
        known = error if ours else packages.missing(f"`{name}`", COMMANDS[name].extra, error.name)
        sys.exit(f"error: {known}")
    except (UserError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        goes_on = name in ("train", "index")
        again = "; the same command goes on from where it was" * goes_on
        print(f"Interrupted{again}.", file=sys.stderr)
        sys.exit(interrupts.EXIT_TEMPFAIL if name == "train" else 130)
