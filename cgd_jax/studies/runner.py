"""Studies: variants of one experiment, several seeds each, run and compared by one command.

python main.py --config=configs/glyphs.py --mode=study --study=descriptors

A study is a file of four names, see configs/studies. Each of its runs is an ordinary work
folder, trained by a process of its own.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from tabulate import tabulate
from tqdm import tqdm

from cgd_jax.config import ConfigError, validate
from cgd_jax.reports.history import read_history
from cgd_jax.runtime import console, files, interrupts
from cgd_jax.studies import comparison
from cgd_jax.workdir import check_workdir

__all__ = ["Study", "load", "plan", "run_study", "with_base_config"]

FOLDER = "configs/studies"

# Recall is taken at the last step, not at the step where the test classes liked it best:
# choosing by what is reported favours the variant that is evaluated or jumps the most (Musgrave
# et al., https://arxiv.org/abs/2003.08505). Baselines are the same for all runs.
FIXED = {"eval.baselines": False}


class Study(NamedTuple):
    """What a file in configs/studies says."""

    name: str
    question: str  # its docstring
    config: str  # the base, unless the command line names another
    reference: str  # the variant that the others are compared with
    variants: dict[str, dict]  # name → path of a config key → value
    seeds: tuple[int, ...]


class Run(NamedTuple):
    """One training run of a study."""

    variant: str
    seed: int
    overrides: dict  # path of a config key → value, on top of the base config
    config: ConfigDict
    folder: Path

    def finished(self) -> bool:
        """Whether it ran to its end."""
        return (self.folder / "results.json").exists()

    def name(self) -> str:
        """For people."""
        return f"{self.variant}, seed {self.seed}"


class Place(NamedTuple):
    """Where one run at a time is trained."""

    environment: dict[str, str]  # makes JAX see this device alone
    cores: set[int] | None  # of a CPU that several runs share


class Unfinished(RuntimeError):
    """Some runs of a study failed; the message says which and where to look."""


def load(name: str) -> Study:
    """Reads a study.

    Args:
      name: of a file in configs/studies without its .py, or the path of a file.

    Raises:
      ConfigError: there is none, or it is not as it should be.
    """
    path = Path(name) if name.endswith(".py") else Path(FOLDER, f"{name}.py")
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in Path(FOLDER).glob("[!_]*.py")))
        raise ConfigError(f"--study={name}: there is no file {path}; there are {known}.")
    spec = importlib.util.spec_from_file_location(f"study_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        question = " ".join((module.__doc__ or "").split())
        variants, seeds = dict(module.VARIANTS), tuple(module.SEEDS)
        study = Study(path.stem, question, module.CONFIG, module.REFERENCE, variants, seeds)
    except Exception as error:
        raise ConfigError(
            f"{path} is not a study: {type(error).__name__}: {error}. It needs CONFIG, VARIANTS "
            f"(name → dict of config keys), REFERENCE (one of them) and SEEDS."
        ) from error
    if not seeds:
        raise ConfigError(f"{path}: SEEDS is empty.")
    if study.reference not in study.variants:
        listed = ", ".join(study.variants)
        raise ConfigError(f"{path}: REFERENCE={study.reference!r} is none of VARIANTS, {listed}.")
    return study


def with_base_config(argv: list[str]) -> list[str]:
    """Adds --config of a study to a command line that has --study, but no --config.

    Raises:
      SystemExit: there is no such study.
    """
    flags = [argument.lstrip("-") for argument in argv]
    named = [flag.partition("=")[2] for flag in flags if flag.startswith("study=")]
    if not named or any(flag == "config" or flag.startswith("config=") for flag in flags):
        return argv
    try:
        return [argv[0], f"--config={load(named[-1]).config}", *argv[1:]]
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None


def plan(
    study: Study,
    config: ConfigDict,
    given: dict,
    workdir: str,
    variants: list[str] | None = None,
    seeds: list[int] | None = None,
) -> list[Run]:
    """All runs of a study, every seed of all variants before the next one.

    A run's folder is called after what it changes in the base config, so that studies with
    the same work folder share the runs that they have in common.

    Args:
      study: from `load`.
      config: the base, with what the command line gave.
      given: what the command line gave: path of a config key → value.
      workdir: the runs are folders in it.
      variants: names of the ones to run, in this order; None for all.
      seeds: None for the study's.

    Raises:
      ConfigError: a run that could not be trained, or whose folder holds another one.
    """
    chosen = list(study.variants) if variants is None else variants
    unknown = [name for name in chosen if name not in study.variants]
    if unknown:
        raise ConfigError(
            f"--variants: {study.name} has no {', '.join(unknown)}; it has "
            f"{', '.join(study.variants)}."
        )
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"--variants={','.join(chosen)} names one twice.")
    if study.reference not in chosen:
        raise ConfigError(
            f"--variants={','.join(chosen)} lacks {study.reference}, which {study.name} compares "
            f"with."
        )
    if any("seed" in study.variants[name] for name in chosen):
        raise ConfigError(f"{study.name} varies the seed itself; SEEDS are for that.")
    varied = {key for name in chosen for key in study.variants[name]} | {"seed"}
    if both := sorted(varied & given.keys()):
        raise ConfigError(f"--config.{both[0]} was given, but it is what {study.name} varies.")
    base = config.copy_and_resolve_references()
    fixed = FIXED | {"train.eval_every": base.train.steps}
    runs = []
    for seed in study.seeds if seeds is None else seeds:
        for name in chosen:
            changes = study.variants[name]
            overrides = fixed | changes | {"seed": seed}
            run_config = base.copy_and_resolve_references()
            try:
                real = {key: value for key, value in changes.items() if _value(base, key) != value}
                run_config.update_from_flattened_dict(overrides)
                validate(run_config)
            except (KeyError, TypeError, ConfigError) as error:
                text = " ".join(str(error.args[0]).split())
                raise ConfigError(f"{study.name}, variant {name}: {text}") from error
            parts = [f"{key}={value}" for key, value in sorted(real.items())] + [f"seed={seed}"]
            folder = Path(workdir, ",".join(parts).replace("/", "_"))
            runs.append(Run(name, seed, overrides, run_config, folder))
            check_workdir(run_config, str(folder))
    folders = [run.folder for run in runs]
    for run in runs:
        if folders.count(run.folder) > 1:
            twins = [other.name() for other in runs if other.folder == run.folder]
            raise ConfigError(f"{study.name}: {' and '.join(twins)} are the same experiment.")
    return runs


def run_study(
    study: Study,
    config: ConfigDict,
    config_file: str,
    given: dict,
    workdir: str,
    variants: list[str] | None = None,
    seeds: list[int] | None = None,
    jobs: int | None = None,
    dry_run: bool = False,
) -> None:
    """Trains what is not trained yet, and writes the comparison.

    In `workdir` there are then a folder a run, and for the study NAME.md, NAME.csv and
    NAME.png, brought up to date after every run.

    Args:
      study: from `load`.
      config: the base, with what the command line gave.
      config_file: where it comes from, with its argument.
      given: what the command line gave: path of a config key → value.
      workdir: may be shared by several studies of the same config.
      variants: names of the ones to run; None for all.
      seeds: None for the study's.
      jobs: how many runs at a time; None for one a device, on a CPU one.
      dry_run: only lists the runs, with how long they will take.

    Raises:
      ConfigError: something that could not be trained; nothing was started.
      Unfinished: runs failed; the others were trained.
      SystemExit: with the status `interrupts.EXIT_TEMPFAIL`, when SIGINT or SIGTERM ended it early.
    """
    jax.config.update("jax_platforms", "cpu")  # the devices are for the runs
    runs = plan(study, config, given, workdir, variants, seeds)
    places = find_places(jobs)
    Path(workdir).mkdir(parents=True, exist_ok=True)
    # Of the interpreter that runs this, and the main.py that was started.
    command = [sys.executable, sys.argv[0], f"--config={config_file}"]
    command += [f"--config.{key}={value}" for key, value in given.items()]
    if dry_run:
        show_plan(runs, command, workdir, places)
        return
    waiting = [run for run in runs if not run.finished()]
    console.say(
        f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished; {len(places)} at a time."
    )
    failed = {}
    if waiting:
        failed = train_all(waiting, command, places, lambda: write_report(study, runs, workdir))
    text = write_report(study, runs, workdir)
    if any(run.finished() for run in runs):
        console.say(f"\n{text}\nLook at {study.name}.png and {study.name}.md in {workdir}.")
    if failed:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
        raise Unfinished(
            f"{len(failed)} of {len(runs)} runs failed; the same command tries them again:{listed}"
        )


def train_all(
    waiting: list[Run], command: list[str], places: list[Place], finished
) -> dict[str, str]:
    """Trains runs, one after another at every place.

    Args:
      waiting: the runs.
      command: that trains the base config.
      places: from `find_places`.
      finished: called after each run.

    Returns:
      Name of each run that failed → why.

    Raises:
      SystemExit: as for `run_study`.
    """
    failed, active, queue, started = {}, {}, list(waiting), time.time()
    told, ended = False, 0
    with (
        interrupts.stop_signals() as stopped_by,
        tqdm(total=len(waiting), desc="study", unit="run", disable=None) as bar,
    ):
        while active or (queue and not stopped_by):
            for number, place in enumerate(places):
                if number not in active and queue and not stopped_by:
                    run = queue.pop(0)
                    active[number] = run, start(run, command, place), time.time()
            if stopped_by and not told:
                told = True
                for _, process, _ in active.values():
                    process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            for number, (run, process, since) in list(active.items()):
                if process.poll() is None:
                    continue
                del active[number]
                bar.update()
                ended += 1
                if process.returncode == 0:
                    left = (time.time() - started) / ended * (len(waiting) - ended) / 60
                    recall = 100 * read_metrics(run)["embedding"]["recall@1"]
                    console.say(
                        f"{run.name()}: R@1 {recall:.2f} %, {time.time() - since:.0f} s; "
                        f"{ended} of {len(waiting)}, about {left:.0f} min left"
                    )
                    finished()
                elif not stopped_by:
                    failed[run.name()] = why(run, process.returncode)
                    console.say(f"{run.name()} failed: {failed[run.name()]}")
    if stopped_by:
        console.say("Stopped; everything is saved, and the same command goes on from there.")
        raise SystemExit(interrupts.EXIT_TEMPFAIL)
    return failed


def find_places(jobs: int | None) -> list[Place]:
    """One place a device of this machine; CPUs are shared out evenly.

    Args:
      jobs: how many are wanted; None for one a device, on a CPU one.

    Raises:
      ConfigError: there are not so many devices, or cores.
    """
    # In a process of its own: a process that has seen a device holds its memory.
    code = (
        "import jax; d = jax.local_devices(); "
        "print(d[0].platform, len({getattr(x, 'coords', x.id) for x in d}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if found.returncode:
        raise ConfigError(f"JAX finds no device: {found.stderr.strip().splitlines()[-1]}")
    platform, count = found.stdout.split()[-2:]
    if platform == "cpu":
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        available, jobs = len(cores) or os.cpu_count(), jobs or 1
    else:
        available, jobs = int(count), jobs or int(count)
    if not 1 <= jobs <= available:
        unit = "CPU cores" if platform == "cpu" else f"devices ({platform})"
        raise ConfigError(f"--jobs={jobs}: this machine has {available} {unit} to share out.")
    if platform == "cpu":
        return [Place({}, set(cores[i::jobs]) if jobs > 1 and cores else None) for i in range(jobs)]
    if platform == "tpu":
        # One chip, as Cloud TPU's documentation describes it.
        alone = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}
        return [Place(alone | {"TPU_VISIBLE_CHIPS": str(i)}, None) for i in range(jobs)]
    variable = "ROCR_VISIBLE_DEVICES" if platform == "rocm" else "CUDA_VISIBLE_DEVICES"
    visible = os.environ.get(variable, "").split(",")
    names = visible if len(visible) == available else list(map(str, range(available)))
    return [Place({variable: names[i]}, None) for i in range(jobs)]


def start(
    run: Run, command: list[str], place: Place, changes: dict | None = None
) -> subprocess.Popen:
    """Starts the training of a run; what it prints goes to log.txt in its folder.

    Args:
      run: to be trained.
      command: that trains the base config.
      place: where.
      changes: path of a config key → value, on top of the run's own.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    overrides = run.overrides | (changes or {})
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    with open(run.folder / "log.txt", "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, *flags, f"--workdir={run.folder}"],
            env=os.environ | place.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C is passed on by the study, once
        )
    if place.cores:
        os.sched_setaffinity(process.pid, place.cores)
    return process


def why(run: Run, status: int) -> str:
    """What a failed run said last."""
    path = run.folder / "log.txt"
    lines = path.read_text(encoding="utf-8").strip().splitlines() or ["it said nothing"]
    return f"exit status {status}, {lines[-1]} (see {path})"


def read_metrics(run: Run) -> dict[str, dict]:
    """What a finished run measured at its last step: name of the vector → metrics."""
    result = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
    return {"embedding": result["metrics"], **result["with options"]}


def training_seconds(run: Run) -> float:
    """How long the steps that a run has done took, without compiling and evaluating."""
    train_config = run.config.train
    images = train_config.classes_per_batch * train_config.images_per_class
    seconds, before = 0.0, 0
    for row in read_history(run.folder / "history.csv"):
        if "images_per_second" in row:
            seconds += (row["step"] - before) * images / row["images_per_second"]
            before = row["step"]
    return seconds


def write_report(study: Study, runs: list[Run], workdir: str) -> str:
    """Writes the comparison of what is finished: NAME.md, NAME.csv, NAME.png.

    Returns:
      The text of NAME.md.
    """
    measured, seconds = {}, {}
    for run in runs:
        if run.finished():
            seconds.setdefault(run.variant, []).append(training_seconds(run))
            for vector, values in read_metrics(run).items():
                for name, value in values.items():
                    if name.startswith("recall@") or name == "map@r":
                        by_variant = measured.setdefault(vector, {}).setdefault(name, {})
                        by_variant.setdefault(run.variant, {})[run.seed] = value
    if not measured:
        return ""
    first = runs[0].config
    seeds = list(dict.fromkeys(run.seed for run in runs))
    facts = {
        "training": {name: f"{np.mean(values):.0f} s" for name, values in seconds.items()},
        "embedding": {run.variant: str(run.config.model.embedding_dim) for run in runs},
    }
    done = sum(run.finished() for run in runs)
    lines = [
        f"# {study.name}, {first.data.name}",
        study.question,
        f"{first.train.steps:,} steps, seeds {', '.join(map(str, seeds))}; {done} of {len(runs)} "
        f"runs are finished. Per cent, on classes never seen in training, at the last step.",
    ]
    for vector, metrics in measured.items():
        if len(measured) > 1:
            lines.append(f"## Vector: {vector}")
        lines.append(comparison.markdown_table(metrics, study.reference, facts))
    lines.append(
        "Intervals are 95 %, by Student's t over seeds. Differences are paired: the same seed has "
        "the same batches. A star marks one whose interval excludes zero; of twenty such "
        "comparisons one would by chance. Training time is that of the steps alone."
    )
    fewest = min(len(values) for values in measured["embedding"]["recall@1"].values())
    if fewest < comparison.FEW_SEEDS:
        lines.append(
            f"**Warning:** there are variants with {fewest} seed{'s' * (fewest > 1)}. Fewer than "
            f"{comparison.FEW_SEEDS} leave next to nothing to judge the noise by."
        )
    text = "\n\n".join(lines) + "\n"
    files.write_atomically(Path(workdir, f"{study.name}.md"), text)
    parts = [
        comparison.to_csv(metrics, study.reference, vector) for vector, metrics in measured.items()
    ]
    header = ",".join(comparison.COLUMNS) + "\n"
    files.write_atomically(Path(workdir, f"{study.name}.csv"), header + "".join(parts))
    rows = comparison.compare(measured["embedding"]["recall@1"], study.reference)
    title = f"{study.name}, {first.data.name}, {first.train.steps:,} steps"
    path = Path(workdir, f"{study.name}.png")
    comparison.plot(path, rows, study.reference, "R@1", title)
    return text


def show_plan(runs: list[Run], command: list[str], workdir: str, places: list[Place]) -> None:
    """Lists the runs with an estimate of their time.

    The first steps of every variant are trained for it, once: first_steps.json keeps what
    they took.
    """
    path = Path(workdir, "first_steps.json")
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows, total = [], 0.0
    for run in tqdm(runs, desc="first steps", unit="run", leave=False, disable=None):
        steps = run.config.train.steps
        history = read_history(run.folder / "history.csv")
        done = int(history[-1]["step"]) if history else 0
        state, left = "finished", 0.0
        if not run.finished():
            if run.variant not in known:
                known[run.variant] = time_first_steps(run, command, workdir, places[0])
                files.write_json(path, known)
            fixed, per_step = known[run.variant]
            left = fixed + per_step * (steps - done)
            state = f"step {done} of {steps}" if done else "not begun"
        total += left
        rows.append([run.variant, run.seed, state, f"{left / 60:.1f} min", run.folder])
    console.say(tabulate(rows, ["variant", "seed", "state", "time left", "folder"]))
    console.say(
        f"\nAbout {total / len(places) / 60:.0f} min, {len(places)} at a time. Nothing was started."
    )


# Enough for a rate behind the compilation, and few.
FIRST_STEPS = 12


def time_first_steps(
    run: Run, command: list[str], workdir: str, place: Place
) -> tuple[float, float]:
    """Trains the first steps of a run in a folder that is thrown away, and evaluates.

    Returns:
      Seconds for all but the steps; seconds a step.

    Raises:
      Unfinished: it failed.
    """
    short = {
        "train.steps": FIRST_STEPS,
        "train.eval_every": FIRST_STEPS,
        "train.checkpoint_every": FIRST_STEPS,
        "train.log_every": FIRST_STEPS // 3,
    }
    with tempfile.TemporaryDirectory(prefix="first-steps-", dir=workdir) as folder:
        short_run = run._replace(folder=Path(folder))
        started = time.time()
        process = start(short_run, command, place, short)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.kill()
            process.wait()
            raise
        if status:
            raise Unfinished(f"The first steps of {run.name()} failed: {why(short_run, status)}")
        seconds = time.time() - started
        rate = read_history(short_run.folder / "history.csv")[-1]["images_per_second"]
    images = run.config.train.classes_per_batch * run.config.train.images_per_class
    return seconds - FIRST_STEPS * images / rate, images / rate


def _value(config: ConfigDict, path: str):
    for part in path.split("."):
        config = config[part]
    return config
