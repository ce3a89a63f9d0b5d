"""The command line: `cgd_jax --config=glyphs`, in a clone `python main.py --config=glyphs`."""

import os
import re
import signal
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags, logging
from ml_collections import config_flags

from cgd_jax import config_files
from cgd_jax.runtime import console, interrupts, memory, packages
from cgd_jax.runtime.errors import UserError

# Whatever imports JAX is imported where it is needed: --help, and --mode=index, which often has
# nothing to do, end before it would be there.

__all__ = ["main"]


class Mode(NamedTuple):
    """A value of --mode."""

    what: str  # it does
    example: str
    takes: tuple[str, ...]  # flags, beside those of every mode
    extra: str = "train"  # of pyproject.toml, with the packages it needs


MODES = {
    "train": Mode(
        "trains and evaluates, or goes on where it was stopped",
        "--config=glyphs",
        ("config",),
    ),
    "eval": Mode(
        "evaluates a checkpoint again, with other options if you like",
        "--mode=eval --workdir=runs/glyphs",
        ("config", "step"),
    ),
    "data": Mode(
        "builds and counts a data set, draws a batch as the network sees it",
        "--mode=data --config=image_folder --config.data.source=PHOTOS",
        ("config",),
    ),
    "explain": Mode(
        "draws which regions make two images alike",
        "--mode=explain --workdir=runs/glyphs",
        ("config", "step", "query", "match"),
    ),
    "export": Mode(
        "writes the network into files to take away",
        "--mode=export --workdir=runs/glyphs",
        ("config", "step", "push_to_hub"),
    ),
    "study": Mode(
        "trains variants with several seeds and compares them",
        "--mode=study --study=descriptors",
        ("config", "study", "variants", "seeds", "jobs", "dry_run"),
    ),
    "index": Mode(
        "embeds your own pictures into an index, or brings it up to date",
        "--mode=index --images=PHOTOS",
        ("index", "model", "images", "vector", "precision", "whiten"),
        "search",
    ),
    "search": Mode(
        "finds the pictures of an index that are most like another one",
        "--mode=search --query=a.jpg",
        (
            *("index", "model", "query", "k", "where", "exact", "crop", "duplicates"),
            *("similarity", "json", "picture"),
        ),
        "search",
    ),
    "serve": Mode(
        "searches an index from the browser",
        "--mode=serve",
        ("index", "model", "host", "port", "show_paths"),
        "serve",
    ),
}
OF_INDEXES = ("index", "search", "serve")
# What --help calls the value of a flag that is neither one of a few nor a number.
VALUES = {
    "config": "NAME",
    "workdir": "FOLDER",
    "query": "FILE",
    "match": "FILE",
    "push_to_hub": "OWNER/NAME",
    "study": "NAME",
    "variants": "NAME,NAME",
    "seeds": "NUMBER,NUMBER",
    "index": "ADDRESS",
    "images": "FOLDER",
    "model": "FILE",
    "vector": "NAME",
    "where": "SQL",
    "crop": "X,Y,WIDTH,HEIGHT",
    "picture": "FILE",
    "host": "ADDRESS",
    "coordinator": "HOST:PORT",
}


def define_flags(argv: list[str]) -> flags.FlagValues:
    """Returns all flags, not parsed yet.

    Args:
      argv: the command line, in which --config.KEY is looked for.
    """
    given = flags.FlagValues()
    known: dict[str, Any] = {"flag_values": given}
    config_flags.DEFINE_config_file(
        "config",
        None,
        f"The experiment: {config_files.listed()}, or a file of your own; behind a colon the "
        "argument that it takes, as in glyphs:SMG. --config.KEY=VALUE changes a value, as in "
        "--config.train.steps=500; configs/base.py explains every key.",
        sys_argv=argv,
        **known,
    )
    flags.DEFINE_enum("mode", "train", list(MODES), "What to do; else train.", **known)
    flags.DEFINE_string(
        "workdir", None, "Of the run; else runs/CONFIG, or runs/studies/CONFIG.", **known
    )
    flags.DEFINE_integer("step", None, "The checkpoint; else the one with the best R@1.", **known)
    flags.DEFINE_multi_string(
        "query",
        None,
        "An image; for search also a folder, and several times. Without it explain takes pairs of "
        "the test set.",
        **known,
    )
    flags.DEFINE_string("match", None, "The image that --query is compared with.", **known)
    flags.DEFINE_string("push_to_hub", None, "A Hugging Face repository to upload to.", **known)
    flags.DEFINE_string(
        "study",
        None,
        f"The study: {config_files.listed(config_files.FOLDER / 'studies')}, or a file of your "
        "own.",
        **known,
    )
    flags.DEFINE_list("variants", None, "Some of the study's, separated by commas.", **known)
    flags.DEFINE_list("seeds", None, "Others than the study's: 0,1,2.", **known)
    flags.DEFINE_integer("jobs", None, "Runs that share a CPU; else 1.", **known)
    flags.DEFINE_bool("dry_run", False, "Lists runs, times and commands, and ends.", **known)
    flags.DEFINE_string(
        "index",
        None,
        "A folder, s3://..., a file that ends in .db, or the address of a Milvus server; else the "
        "folder index of the run, or runs/index.",
        **known,
    )
    flags.DEFINE_multi_string(
        "images", None, "A folder, an archive or a CSV; may be given several times.", **known
    )
    flags.DEFINE_string(
        "model",
        None,
        "An exported network: a file, a folder, or a Hugging Face repository, owner/name or "
        "owner/name@revision; else that of --workdir, else the index's, else EfficientNet-Lite0 "
        "with G.",
        **known,
    )
    flags.DEFINE_string(
        "vector", None, "Which vector, as config.eval.vector; else what was trained.", **known
    )
    flags.DEFINE_enum(
        "precision", None, ["float32", "float16"], "Of the vectors; else float32.", **known
    )
    flags.DEFINE_integer(
        "whiten", None, "Dimensions of PCA-whitened vectors; else all as they are.", 1, **known
    )
    flags.DEFINE_integer("k", 20, "How many pictures; else 20.", 1, **known)
    flags.DEFINE_string(
        "where", None, "Which pictures, as SQL: label = 'shoes' AND width > 500.", **known
    )
    flags.DEFINE_bool("exact", False, "Compares with every picture.", **known)
    flags.DEFINE_string("crop", None, "The part of the query to search by, in pixels.", **known)
    flags.DEFINE_bool(
        "duplicates", False, "Lists groups of pictures that are nearly the same.", **known
    )
    flags.DEFINE_float(
        "similarity", None, "With --duplicates: the cosine from which they are; else 0.94.", **known
    )
    flags.DEFINE_bool("json", False, "Prints JSON, and nothing else.", **known)
    flags.DEFINE_string(
        "picture", "search.png", "The PNG that shows what was found; else search.png.", **known
    )
    flags.DEFINE_string(
        "host",
        "127.0.0.1",
        "The address of this machine to listen at, such as 0.0.0.0 for all, where a token is "
        "needed; else 127.0.0.1.",
        **known,
    )
    flags.DEFINE_integer("port", 8000, "Where to listen; else 8000.", 0, 65535, **known)
    flags.DEFINE_bool("show_paths", False, "Tells where pictures lie.", **known)
    flags.DEFINE_bool(
        "distributed",
        False,
        "Several processes, as SLURM, Open MPI or the TPU pod has started them.",
        **known,
    )
    flags.DEFINE_string(
        "coordinator",
        None,
        "Several processes, started by hand: where the first one is.",
        **known,
    )
    flags.DEFINE_integer("num_processes", None, "With --coordinator: how many.", **known)
    flags.DEFINE_integer("process_id", None, "With --coordinator: which one, from 0.", **known)
    return given


def program(argv: list[str]) -> str:
    """Returns how the user called this program, in short."""
    name = Path(argv[0]).name
    return {"main.py": "python main.py", "__main__.py": "python -m cgd_jax"}.get(name, name)


def help_text(argv: list[str]) -> str:
    """Returns what --help shows: the modes, an example of each, the flags by mode."""
    known, width = define_flags(argv), min(console.columns(), 100)
    lines = [
        "Image retrieval with combined global descriptors.",
        "",
        "Modes, each with an example; --mode=train where none is given:",
    ]
    for name, mode in MODES.items():
        lines += ["", *_wrapped(f"  {name:9}", mode.what, width)]
        lines += [f"    {program(argv)} {mode.example}"]
    taken = {flag: tuple(name for name in MODES if flag in MODES[name].takes) for flag in known}
    for modes in sorted(dict.fromkeys(taken.values()), key=bool):
        lines += ["", f"Flags of {_and(modes) or 'every mode'}:"]
        for flag in (known[name] for name in taken if taken[name] == modes):
            values = "|".join(getattr(flag.parser, "enum_values", ()))
            values = "" if flag.boolean else f"={values or VALUES.get(flag.name, 'NUMBER')}"
            # absl lists the values in front, and behind that a flag may be repeated.
            text = flag.help.rpartition(">: ")[2].partition(";\n")[0]
            lines += [f"  --{flag.name}{values}", *_wrapped(" " * 8, text, width)]
    return "\n".join(lines)


def _wrapped(first: str, text: str, width: int) -> list[str]:
    options: dict[str, Any] = {"subsequent_indent": " " * len(first), "break_on_hyphens": False}
    return textwrap.wrap(text, width, initial_indent=first, **options)


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def parse_flags(argv: list[str]) -> flags.FlagValues:
    """Parses the command line; a mistake in it, or a config that fails, is said in one line."""
    if any(re.fullmatch("-h|--?help(full|short)?", argument) for argument in argv[1:]):
        print(help_text(argv))
        sys.exit()
    config_files.make_importable()
    try:
        if any(argument.lstrip("-").startswith("study") for argument in argv):
            packages.require("--mode=study", "train", "jax", "flax", "optax")
            from cgd_jax.studies.study import with_base_config

            argv = with_base_config(argv)
        argv = with_config_file(argv)
        given = define_flags(argv)
        rest = given(argv)[1:]
        if given.config is not None:
            given.config.to_dict()  # a config file that cannot be loaded is reported on first use
        check_flags(given, rest, argv)
        return given
    except flags.Error as error:
        sys.exit(f"error: {error}")
    except Exception as error:  # whatever the user's file raises
        text: Any = error
        while isinstance(text, AttributeError | KeyError) and text.args:  # one wraps the other
            text = text.args[0]
        text = " ".join(str(text).split())
        if absent := re.match(r"'(\w+)'", text):  # so ml_collections names a key
            for flag in (argument.partition("=")[0] for argument in argv):
                if flag.startswith("--config.") and absent[1] in flag.split("."):
                    sys.exit(
                        f"error: {flag}: the config has no key {absent[0]}; configs/base.py "
                        f"explains those it has.{text[absent.end() :]}"
                    )
        named = re.search(r"^--?config[=\n]([^:\n]*)", "\n".join(argv), re.MULTILINE)
        file = named[1] if named else ""
        sys.exit(f"error: --config={file} cannot be used: {type(error).__name__}: {text}")


def with_config_file(argv: list[str]) -> list[str]:
    """Returns the command line with the file of a config in place of its name.

    Raises:
      SystemExit: There is no such config.
    """
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
            sys.exit(
                f"error: --config={name}: there is no such config or file; there are "
                f"{config_files.listed()}, or give the path of a file of your own."
            )
        argv[i] = f"{flag}{path or name}{colon}{rest}"
    return argv


def check_flags(given: flags.FlagValues, rest: list[str], argv: list[str]) -> None:
    """Ends with one line about flags that do not go together.

    Args:
      given: the flags.
      rest: arguments that are no flags.
      argv: the command line.
    """
    mode = given.mode
    if rest:
        hint = f"--mode={rest[0]}" if rest[0] in MODES else "--config=glyphs"
        sys.exit(f"error: {rest[0]!r} is no flag; flags look like {hint}.")
    for name in given:
        modes = [f"--mode={mode}" for mode in MODES if name in MODES[mode].takes]
        if given[name].present and modes and name not in MODES[mode].takes:
            sys.exit(f"error: --{name} goes with {_and(modes)}.")
    if [given.coordinator, given.num_processes, given.process_id].count(None) not in (0, 3):
        sys.exit("error: --coordinator, --num_processes and --process_id go together.")
    if mode == "study" and not given.study:
        sys.exit("error: --mode=study and --study=NAME go together.")
    if not all(seed.isdigit() for seed in given.seeds or []):
        sys.exit(f"error: --seeds={','.join(given.seeds)}: give whole numbers such as 0,1,2.")
    if mode == "explain" and (len(given.query or []) > 1 or bool(given.query) != bool(given.match)):
        sys.exit("error: --query and --match go together: the two images to compare.")
    if mode in OF_INDEXES and given.workdir and given.model:
        sys.exit("error: --workdir and --model both name a network; give one of them.")
    if mode == "index" and not given.images:
        sys.exit("error: say what to index: --images=PHOTOS, a folder, an archive or a CSV.")
    if mode == "search" and bool(given.query) == given.duplicates:
        sys.exit("error: say what to search by, --query=a.jpg, or look for --duplicates.")
    if given.duplicates and (given.crop or given["k"].present):
        sys.exit("error: --crop and --k do not go with --duplicates.")
    if given["similarity"].present and not given.duplicates:
        sys.exit("error: --similarity goes with --duplicates.")
    of_a_run = mode in ("eval", "export", "explain") and given.workdir
    if mode not in OF_INDEXES and not given.config and not of_a_run:
        sys.exit(
            f"error: say what to run: {program(argv)} --config=glyphs, for example; --help lists "
            f"what there is."
        )


def run_mode(given: flags.FlagValues) -> None:
    """Does what --mode says."""
    if given.mode in OF_INDEXES:
        run_search_mode(given)
        return
    from cgd_jax import evaluate, explain, export, inspect_data, train
    from cgd_jax.studies import runner, study
    from cgd_jax.workdir import default_workdir

    workdir, config_file = given.workdir, ""
    if given.config:
        config_file = config_flags.get_config_filename(given["config"])
    if not workdir:
        workdir = default_workdir(config_file, "runs/studies" if given.study else "runs")
    match given.mode:
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
            command += [f"--config={config_file}"]
            command += [f"--config.{key}={value}" for key, value in changed.items()]
            runner.run_study(chosen, runs, command, workdir, given.jobs, given.dry_run)


def run_search_mode(given: flags.FlagValues) -> None:
    """Does what --mode=index, search or serve says."""
    from cgd_jax.search import commands

    address = given.index or commands.default_address(given.workdir)
    model = given.model or given.workdir
    if given.mode == "index":
        commands.fill_index(
            address,
            given.images,
            model,
            vector=given.vector,
            precision=given.precision,
            whiten=given.whiten,
            share=share_of_files(given),
        )
    elif given.mode == "serve":
        from cgd_jax.serve.command import serve

        serve(address, model, host=given.host, port=given.port, show_paths=given.show_paths)
    else:
        commands.search_index(
            address,
            given.query,
            model,
            k=given.k,
            where=given.where,
            exact=given.exact,
            crop=given.crop,
            duplicates=given.similarity,
            as_json=given.json,
            figure=given.picture,
        )


def share_of_files(given: flags.FlagValues) -> tuple[int, int]:
    """Returns which of several processes this is, and how many there are."""
    if not (given.distributed or given.coordinator):
        return 0, 1
    import jax

    return jax.process_index(), jax.process_count()


def is_for_the_user(error: Exception, mode: str) -> bool:
    """Returns whether an error says what to do, rather than where the program is wrong."""
    if mode in OF_INDEXES:
        return isinstance(error, ValueError)
    return isinstance(error, UserError)


def main(argv: list[str]) -> None:
    """Does what a command line says.

    Args:
      argv: the program and its arguments, as in `sys.argv`.

    Raises:
      SystemExit: With a message, what is wrong; or with a status.
    """
    # Errors reach the user as exceptions; what libraries log beside them is noise.
    logging.set_verbosity(logging.FATAL)
    given = parse_flags(argv)
    if not given.json:
        console.show_log()
    memory.keep_freed_memory()
    memory.collect_garbage_rarely()
    try:
        if given.distributed or given.coordinator:
            from cgd_jax.runtime import processes

            processes.start(given.coordinator, given.num_processes, given.process_id)
        run_mode(given)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, as behind `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ModuleNotFoundError as error:
        ours = (error.name or "cgd_jax").startswith("cgd_jax") or "pip install" in str(error)
        what = f"--mode={given.mode}"
        known = error if ours else packages.missing(what, MODES[given.mode].extra, error.name)
        sys.exit(f"error: {known}")
    except (ImportError, OSError) as error:
        sys.exit(f"error: {error}")
    except (UserError, ValueError) as error:
        if not is_for_the_user(error, given.mode):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        if given.mode in ("train", "index"):
            print("Interrupted; the same command goes on from where it was.", file=sys.stderr)
        else:
            print("Interrupted.", file=sys.stderr)
        sys.exit(interrupts.EXIT_TEMPFAIL if given.mode == "train" else 130)
