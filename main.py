"""Trains and evaluates: `python main.py --config=configs/glyphs.py`."""

import re
import signal
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from cgd_jax.runtime import console, interrupts, memory

# Everything else is imported where it is needed: --mode=index, which has often nothing to do,
# ends before JAX would be there.
CLONE = Path(__file__).resolve().parent

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File of the experiment, with an argument behind a colon if it takes one."
)
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "data", "export", "study", "explain", "index", "search", "serve"],
    "What to do.",
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; by default runs/<config>.")
STEP = flags.DEFINE_integer(
    "step", None, "With --mode=eval, export and explain: the checkpoint; by default the best."
)
QUERY = flags.DEFINE_multi_string(
    "query",
    None,
    "With --mode=explain: the file of an image; by default pairs of the test set. With "
    "--mode=search: a file or folder to search by; may be given several times.",
)
MATCH = flags.DEFINE_string(
    "match", None, "With --mode=explain: the file of the image that --query is compared with."
)
PUSH = flags.DEFINE_string(
    "push_to_hub", None, "With --mode=export: a Hugging Face repository, owner/name, to upload to."
)
STUDY = flags.DEFINE_string(
    "study", None, "With --mode=study: a file of configs/studies, such as descriptors."
)
VARIANTS = flags.DEFINE_list("variants", None, "With --mode=study: some of them, separated by ,")
SEEDS = flags.DEFINE_list("seeds", None, "With --mode=study: others than the study's.")
JOBS = flags.DEFINE_integer("jobs", None, "With --mode=study: runs that share a CPU; else 1.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "With --mode=study: lists runs, times, commands.")
INDEX = flags.DEFINE_string(
    "index",
    None,
    "With --mode=index, search and serve: a folder, s3://..., a file that ends in .db, or the "
    "address of a Milvus server; by default the folder index of the run, or runs/index.",
)
IMAGES = flags.DEFINE_multi_string(
    "images", None, "With --mode=index: a folder, an archive or a CSV; may be given several times."
)
MODEL = flags.DEFINE_string(
    "model",
    None,
    "With --mode=index, search and serve: an exported network, a file, folder or Hugging Face "
    "repository; by default that of --workdir, else the index's, else EfficientNet-Lite0 with G.",
)
VECTOR = flags.DEFINE_string(
    "vector", None, "With --mode=index: as --config.eval.vector; by default what was trained."
)
PRECISION = flags.DEFINE_enum(
    "precision", None, ["float32", "float16"], "With --mode=index: of the vectors; else float32."
)
WHITEN = flags.DEFINE_integer(
    "whiten",
    None,
    "With --mode=index: dimensions of PCA-whitened vectors; else all as they are.",
    1,
)
K = flags.DEFINE_integer("k", 20, "With --mode=search: how many pictures.", 1)
WHERE = flags.DEFINE_string(
    "where", None, "With --mode=search: which pictures, as SQL: label = 'shoes' AND width > 500."
)
EXACT = flags.DEFINE_bool("exact", False, "With --mode=search: compares with every picture.")
CROP = flags.DEFINE_string(
    "crop", None, "With --mode=search: the part of the query, x,y,width,height in pixels."
)
DUPLICATES = flags.DEFINE_bool(
    "duplicates", False, "With --mode=search: lists groups of pictures that are nearly the same."
)
SIMILARITY = flags.DEFINE_float(
    "similarity", 0.97, "With --duplicates: the cosine from which they are."
)
JSON = flags.DEFINE_bool("json", False, "With --mode=search: prints JSON, and nothing else.")
PICTURE = flags.DEFINE_string(
    "picture", "search.png", "With --mode=search: the PNG that shows what was found."
)
HOST = flags.DEFINE_string(
    "host",
    "127.0.0.1",
    "With --mode=serve: the address of this machine to listen at, such as 0.0.0.0 for all; a "
    "token is needed then.",
)
PORT = flags.DEFINE_integer("port", 8000, "With --mode=serve: where to listen.", 0, 65535)
SHOW_PATHS = flags.DEFINE_bool("show_paths", False, "With --mode=serve: tells where pictures lie.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Several processes, as SLURM, Open MPI or the TPU pod has started them."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Several processes, started by hand: HOST:PORT of the first one."
)
PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many.")
PROCESS = flags.DEFINE_integer("process_id", None, "With --coordinator: which one, from 0.")


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; a mistake in it, or a config that fails, is said in one line."""
    config = flags.FLAGS["config"]
    try:
        if any(argument.lstrip("-").startswith("study") for argument in argv):
            from cgd_jax.studies.study import with_base_config

            argv = with_base_config(argv, CLONE)
        arguments = flags.FLAGS(argv)
        if config.value is not None:
            config.value.to_dict()  # a config file that cannot be loaded is reported on first use
        return arguments
    except flags.Error as error:
        sys.exit(f"error: {error}")
    except Exception as error:  # whatever the user's file raises
        text = error
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
        # The flag itself does not know its file until every override was understood.
        given = re.search(r"^--?config[=\n]([^:\n]*)", "\n".join(argv), re.MULTILINE)
        file = given[1] if given else ""
        if file and not Path(file).is_file():
            folder = CLONE / "configs"
            known = ", ".join(sorted(f"configs/{path.name}" for path in folder.glob("[!_]*.py")))
            sys.exit(f"error: --config={file}: there is no such file; there are {known}.")
        sys.exit(f"error: --config={file} cannot be used: {type(error).__name__}: {text}")


def check_flags(argv: list[str]) -> None:
    """Ends with one line about flags that do not go together."""
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is no flag; flags look like --config=configs/glyphs.py.")
    if [COORDINATOR.value, PROCESSES.value, PROCESS.value].count(None) not in (0, 3):
        sys.exit("error: --coordinator, --num_processes and --process_id go together.")
    if PUSH.value and MODE.value != "export":
        sys.exit("error: --push_to_hub goes with --mode=export.")
    if (MODE.value == "study") != bool(STUDY.value):
        sys.exit("error: --mode=study and --study=NAME go together.")
    of_study = [VARIANTS.value, SEEDS.value, JOBS.value, DRY_RUN.value or None]
    if MODE.value != "study" and of_study.count(None) < len(of_study):
        sys.exit("error: --variants, --seeds, --jobs and --dry_run go with --mode=study.")
    if not all(seed.isdigit() for seed in SEEDS.value or []):
        sys.exit(f"error: --seeds={','.join(SEEDS.value)}: give whole numbers such as 0,1,2.")
    if MODE.value in OF_INDEXES:
        check_search_flags()
        return
    of_indexes = (name for names in OF_INDEXES.values() for name in names if name != "query")
    given = next((name for name in of_indexes if flags.FLAGS[name].present), "")
    if given:
        modes = " and ".join(f"--mode={mode}" for mode in modes_of(given))
        sys.exit(f"error: --{given} goes with {modes}.")
    if (QUERY.value or MATCH.value) and MODE.value != "explain":
        sys.exit("error: --query and --match go with --mode=explain.")
    if len(QUERY.value or []) > 1 or bool(QUERY.value) != bool(MATCH.value):
        sys.exit("error: --query and --match go together: the two images to compare.")
    if not CONFIG.value and not (MODE.value in ("eval", "export", "explain") and WORKDIR.value):
        sys.exit("error: say what to run: --config=configs/glyphs.py, for example.")


# The flags of the modes that make or use an index.
OF_INDEXES = {
    "index": ("images", "vector", "precision", "whiten", "model", "index"),
    "search": (
        *("query", "k", "where", "exact", "crop", "duplicates", "similarity", "json", "picture"),
        *("model", "index"),
    ),
    "serve": ("host", "port", "show_paths", "model", "index"),
}


def modes_of(flag: str) -> list[str]:
    """Returns the modes that a flag of an index goes with."""
    return [mode for mode, names in OF_INDEXES.items() if flag in names]


def check_search_flags() -> None:
    """Ends with one line about flags that do not go together, with a mode of `OF_INDEXES`."""
    for name in dict.fromkeys(name for names in OF_INDEXES.values() for name in names):
        if flags.FLAGS[name].present and MODE.value not in modes_of(name):
            sys.exit(f"error: --{name} goes with --mode={modes_of(name)[0]}.")
    if MATCH.value or CONFIG.value or STEP.value is not None:
        given = "match" if MATCH.value else "config" if CONFIG.value else "step"
        sys.exit(f"error: --{given} does not go with --mode={MODE.value}.")
    if WORKDIR.value and MODEL.value:
        sys.exit("error: --workdir and --model both name a network; give one of them.")
    if MODE.value == "index" and not IMAGES.value:
        sys.exit("error: say what to index: --images=PHOTOS, a folder, an archive or a CSV.")
    if MODE.value == "search" and bool(QUERY.value) == DUPLICATES.value:
        sys.exit("error: say what to search by, --query=a.jpg, or look for --duplicates.")
    if DUPLICATES.value and (CROP.value or flags.FLAGS["k"].present):
        sys.exit("error: --crop and --k do not go with --duplicates.")
    if flags.FLAGS["similarity"].present and not DUPLICATES.value:
        sys.exit("error: --similarity goes with --duplicates.")


def run_mode() -> None:
    """Does what --mode says."""
    if MODE.value in OF_INDEXES:
        run_search_mode()
        return
    from cgd_jax import evaluate, explain, export, inspect_data, train
    from cgd_jax.studies import runner, study
    from cgd_jax.workdir import default_workdir

    workdir, config_file = WORKDIR.value, None
    if CONFIG.value:
        config_file = config_flags.get_config_filename(flags.FLAGS["config"])
    if not workdir:
        workdir = default_workdir(config_file, "runs/studies" if STUDY.value else "runs")
    match MODE.value:
        case "train":
            # Until training takes over, SIGTERM is like Ctrl-C: nothing is lost yet.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            train.train_and_evaluate(CONFIG.value, workdir)
        case "data":
            inspect_data.show_data(CONFIG.value, workdir)
        case "eval":
            evaluate.evaluate_run(workdir, STEP.value, CONFIG.value)
        case "explain":
            pictures = explain.explain_run(
                workdir, STEP.value, (QUERY.value or [None])[0], MATCH.value
            )
            console.say(f"Look at {' and '.join(map(str, pictures))}.")
        case "export":
            folder = export.export_run(workdir, STEP.value)
            console.say(f"{folder} holds the network; its README.md says how to open it.")
            if PUSH.value:
                console.say(f"Uploaded to {export.push_to_hub(folder, PUSH.value)}")
        case "study":
            chosen = study.load(STUDY.value, CLONE)
            given = config_flags.get_override_values(flags.FLAGS["config"])
            seeds = SEEDS.value and list(map(int, SEEDS.value))
            runs = study.plan(chosen, CONFIG.value, given, workdir, VARIANTS.value, seeds)
            command = [sys.executable, str(CLONE / "main.py"), f"--config={config_file}"]
            command += [f"--config.{key}={value}" for key, value in given.items()]
            runner.run_study(chosen, runs, command, workdir, JOBS.value, DRY_RUN.value)


def run_search_mode() -> None:
    """Does what --mode=index, search or serve says."""
    from cgd_jax.search import commands

    address = INDEX.value or commands.default_address(WORKDIR.value)
    model = MODEL.value or WORKDIR.value
    if MODE.value == "index":
        commands.fill_index(
            address,
            IMAGES.value,
            model,
            vector=VECTOR.value,
            precision=PRECISION.value,
            whiten=WHITEN.value,
            share=share_of_files(),
        )
    elif MODE.value == "serve":
        from cgd_jax.serve.command import serve

        serve(address, model, host=HOST.value, port=PORT.value, show_paths=SHOW_PATHS.value)
    else:
        commands.search_index(
            address,
            QUERY.value,
            model,
            k=K.value,
            where=WHERE.value,
            exact=EXACT.value,
            crop=CROP.value,
            duplicates=SIMILARITY.value,
            as_json=JSON.value,
            picture=PICTURE.value,
        )


def share_of_files() -> tuple[int, int]:
    """Returns which of several processes this is, and how many there are."""
    if not (DISTRIBUTED.value or COORDINATOR.value):
        return 0, 1
    import jax

    return jax.process_index(), jax.process_count()


def is_for_the_user(error: ValueError | RuntimeError) -> bool:
    """Returns whether an error says what to do, rather than where the program is wrong."""
    if MODE.value in OF_INDEXES:
        return isinstance(error, ValueError)
    from cgd_jax.config import ConfigError
    from cgd_jax.runtime.processes import NotFound
    from cgd_jax.studies.runner import Unfinished
    from cgd_jax.train import Diverged

    return isinstance(error, ConfigError | NotFound | Diverged | Unfinished)


def main(argv: list[str]) -> None:
    # Errors reach the user as exceptions; what libraries log beside them is noise.
    logging.set_verbosity(logging.FATAL)
    if not JSON.value:
        console.show_log()
    check_flags(argv)
    memory.keep_freed_memory()
    try:
        if DISTRIBUTED.value or COORDINATOR.value:
            from cgd_jax.runtime import processes

            processes.start(COORDINATOR.value, PROCESSES.value, PROCESS.value)
        run_mode()
    except (ImportError, OSError) as error:
        sys.exit(f"error: {error}")
    except (ValueError, RuntimeError) as error:
        if not is_for_the_user(error):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        if MODE.value == "index":
            print("Interrupted; the same command goes on from where it was.", file=sys.stderr)
            sys.exit(130)
        if MODE.value != "train":
            print("Interrupted.", file=sys.stderr)
            sys.exit(130)
        print("Interrupted; the same command goes on from where it was.", file=sys.stderr)
        sys.exit(interrupts.EXIT_TEMPFAIL)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
