"""The command line: `cgd_jax train --config=glyphs`; in a clone main.py does what `cgd_jax` does.

`COMMANDS` says what there is and which flags each takes; those of search stand in `search_cli`.
"""

import os
import signal
import sys

from cgd_jax.runtime import packages

try:
    packages.require("The command line", "train", "absl", "ml_collections", "tqdm")
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} To search your own pictures, cgd_jax[search] is enough.")

from absl import flags, logging
from ml_collections import config_flags

from cgd_jax import config_files, search_cli, study_files
from cgd_jax.flags import Command, Flag, parse, program
from cgd_jax.runtime import buckets, compiled, console, interrupts, memory
from cgd_jax.runtime.errors import UserError

# Whatever imports JAX is imported where it is needed: --help ends before it would be there.

STUDIES = config_files.listed(study_files.FOLDER)

COMMANDS = {
    "train": Command(
        "trains and evaluates, or goes on where it was stopped", "--config=glyphs", "config"
    ),
    "eval": Command(
        "evaluates a checkpoint again, with other options if you like",
        "runs/glyphs --eval.flip",
        "config step together",
        "workdir together",
    ),
    "data": Command(
        "builds and counts a data set, draws a batch as the network sees it",
        "--config=image_folder --data.source=IMAGES",
        "config",
    ),
    "explain": Command(
        "draws which regions make two images alike",
        "runs/glyphs A.png B.png",
        "config step query match",
        "workdir query match",
    ),
    "export": Command(
        "writes the network into files to take away",
        "runs/glyphs",
        "config step push_to_hub",
        "workdir",
    ),
    "study": Command(
        "trains variants with several seeds and compares them",
        "descriptors --variants=S,SG --dry_run",
        "config study values variants seeds jobs dry_run",
        "study values",
    ),
    **search_cli.COMMANDS,
}
FLAGS = {
    "mode": Flag(
        "The command, where it is not the first word.",
        "NAME",
        default="train",
        options=tuple(COMMANDS),
    ),
    "workdir": Flag(
        "The folder of a run, or s3://... or gs://...; a new one is runs/CONFIG, or "
        "runs/studies/CONFIG.",
        "FOLDER",
    ),
    "together": Flag("Other runs, evaluated with the first as one ensemble.", "RUN"),
    "step": Flag("The checkpoint; else the chosen one.", "NUMBER"),
    "match": Flag("The image that --query is compared with.", "FILE"),
    "push_to_hub": Flag("A Hugging Face repository to upload to.", "OWNER/NAME"),
    "study": Flag(
        f"The study: {STUDIES}, or a file of your own; or the CSV file that one wrote, to compare "
        f"its runs again.",
        "NAME",
    ),
    "values": Flag("More such CSV files, for verdicts over all.", "FILE"),
    "variants": Flag("Some of the study's, separated by commas.", "NAME,NAME"),
    "seeds": Flag("Others than the study's: 0,1,2.", "NUMBER,NUMBER"),
    "jobs": Flag("Runs at a time, on a CPU; else 1.", "NUMBER", default=1, options=(1,)),
    "dry_run": Flag("Prints the commands of the runs, and ends."),
    "distributed": Flag("Several processes, as SLURM, Open MPI or the TPU pod has started them."),
    "coordinator": Flag("Several processes, started by hand: where the first one is.", "HOST:PORT"),
    "num_processes": Flag("With --coordinator: how many.", "NUMBER"),
    "process_id": Flag("With --coordinator: which one, from 0.", "NUMBER"),
    **search_cli.FLAGS,
}


def check(name: str, given: flags.FlagValues, argv: list[str]) -> None:
    """Ends with one line about flags that are missing or do not go together."""
    if [given.coordinator, given.num_processes, given.process_id].count(None) not in (0, 3):
        raise flags.Error("--coordinator, --num_processes and --process_id go together.")
    if name in search_cli.COMMANDS:
        return search_cli.check(name, given)
    if (given.coordinator or given.distributed) and buckets.is_bucket(given.workdir):
        raise flags.Error("several processes need a --workdir= that all of them see, on a disk.")
    if name == "study" and not given.study:
        raise flags.Error(f"say which study: {STUDIES}, or a file of your own.")
    if name == "study" and not all(seed.isdigit() for seed in given.seeds or []):
        raise flags.Error(f"--seeds={','.join(given.seeds)}: give whole numbers such as 0,1,2.")
    if name == "study" and given.study.endswith(".csv"):
        return None
    if name == "explain" and (len(given.query or []) > 1 or bool(given.query) != bool(given.match)):
        raise flags.Error("--query and --match go together: the two images to compare.")
    if not given.config and not given.workdir:
        example = f"{program(argv)} --config=glyphs"
        raise flags.Error(f"say what to run: {example}, for example; --help lists what there is.")


def run(name: str, given: flags.FlagValues) -> None:
    from cgd_jax import explain, export, inspect_data, train
    from cgd_jax.evaluation import ensemble, evaluate
    from cgd_jax.studies import report, runner, study
    from cgd_jax.workdir import default_workdir

    if name == "study" and given.study.endswith(".csv"):
        return report.compare_again([given.study, *(given["values"].value or [])])
    is_run = given.workdir and name != "study"
    file = "" if is_run else config_flags.get_config_filename(given["config"])
    workdir = given.workdir or default_workdir(file, "runs/studies" if name == "study" else "runs")
    match name:
        case "train":
            # Until training takes over, SIGTERM is like Ctrl-C: nothing is lost yet.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            train.train_and_evaluate(given.config, workdir)
        case "data":
            inspect_data.show_data(given.config, workdir)
        case "eval":
            if given.together:
                ensemble.evaluate_together([workdir, *map(buckets.local, given.together)])
            else:
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
            chosen = study_files.load(given.study)
            if chosen.space:
                packages.require("A search", "tuning", "optuna")
                from cgd_jax.studies import search

                return search.run_search(chosen, given.config, workdir)
            changed = config_flags.get_override_values(given["config"])
            seeds = given.seeds and list(map(int, given.seeds))
            runs = study.plan(chosen, given.config, changed, workdir, given.variants, seeds)
            clone = config_files.FOLDER.parent / "main.py"
            command = [sys.executable, *([str(clone)] if clone.exists() else ["-m", "cgd_jax"])]
            command += [f"--config={file}"]
            command += [f"--config.{key}={value}" for key, value in changed.items()]
            runner.run_study(chosen, runs, command, workdir, given.jobs, given.dry_run)


def main(argv: list[str] | None = None) -> None:
    """Does what a command line, by default `sys.argv`, says; SystemExit says what is wrong."""
    argv = sys.argv if argv is None else argv
    # Errors reach the user as exceptions; what libraries log beside them is noise.
    logging.set_verbosity(logging.FATAL)
    name = "train"
    try:
        name, given = parse(argv, COMMANDS, FLAGS)
        check(name, given, argv)
        if not getattr(given, "json", False):
            console.show_log()
        memory.keep_freed_memory()
        memory.collect_garbage_rarely()
        compiled.keep_compiled()
        if given.distributed or given.coordinator:
            from cgd_jax.runtime import processes

            processes.start(given.coordinator, given.num_processes, given.process_id)
        if name in search_cli.COMMANDS:
            search_cli.run(name, given)
        else:
            trains = name in ("train", "study")
            with buckets.mirrored(given.workdir, trains) as given["workdir"].value:
                run(name, given)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, as behind `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ModuleNotFoundError as error:
        ours = (error.name or "cgd_jax").startswith("cgd_jax") or "pip install" in str(error)
        known = error if ours else packages.missing(f"`{name}`", COMMANDS[name].extra, error.name)
        console.end(known)
    except (UserError, ImportError, OSError, flags.Error) as error:
        console.end(error)
    except KeyboardInterrupt:
        goes_on = name in ("train", "index")
        again = "; the same command goes on from where it was" * goes_on
        print(f"Interrupted{again}.", file=sys.stderr)
        sys.exit(interrupts.EXIT_TEMPFAIL if name == "train" else 130)


if __name__ == "__main__":
    main()
