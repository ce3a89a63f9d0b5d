"""Trains and evaluates: `python main.py --config=configs/glyphs.py`."""

import re
import signal
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from cgd_jax import evaluate, explain, export, inspect_data, train
from cgd_jax.config import ConfigError
from cgd_jax.runtime import console, interrupts, memory, processes
from cgd_jax.studies import runner, study
from cgd_jax.workdir import default_workdir

CLONE = Path(__file__).resolve().parent

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File of the experiment, with an argument behind a colon if it takes one."
)
MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "eval", "data", "export", "study", "explain"], "What to do."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; by default runs/<config>.")
STEP = flags.DEFINE_integer(
    "step", None, "With --mode=eval, export and explain: the checkpoint; by default the best."
)
QUERY = flags.DEFINE_string(
    "query", None, "With --mode=explain: the file of an image; by default pairs of the test set."
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
        arguments = flags.FLAGS(study.with_base_config(argv, CLONE))
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
    if (QUERY.value or MATCH.value) and MODE.value != "explain":
        sys.exit("error: --query and --match go with --mode=explain.")
    if bool(QUERY.value) != bool(MATCH.value):
        sys.exit("error: --query and --match go together: the two images to compare.")
    if not CONFIG.value and not (MODE.value in ("eval", "export", "explain") and WORKDIR.value):
        sys.exit("error: say what to run: --config=configs/glyphs.py, for example.")


def run_mode() -> None:
    """Does what --mode says."""
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
            pictures = explain.explain_run(workdir, STEP.value, QUERY.value, MATCH.value)
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


def main(argv: list[str]) -> None:
    # Errors reach the user as exceptions; what libraries log beside them is noise.
    logging.set_verbosity(logging.FATAL)
    console.show_log()
    check_flags(argv)
    memory.keep_freed_memory()
    try:
        if DISTRIBUTED.value or COORDINATOR.value:
            processes.start(COORDINATOR.value, PROCESSES.value, PROCESS.value)
        run_mode()
    except (
        ConfigError,
        processes.NotFound,
        train.Diverged,
        runner.Unfinished,
        ImportError,
        OSError,
    ) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        if MODE.value != "train":
            print("Interrupted.", file=sys.stderr)
            sys.exit(130)
        print("Interrupted; the same command goes on from where it was.", file=sys.stderr)
        sys.exit(interrupts.EXIT_TEMPFAIL)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
