"""Trains the runs of a study, each in a process of its own.

cgd_jax --mode=study --study=descriptors

On a CPU several runs can share the cores. With accelerators one run at a time has them all;
`--dry_run` prints the command of every run, to be started on a device of its own.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from cgd_jax.reports.history import read_history
from cgd_jax.reports.tables import table
from cgd_jax.runtime import console, files, interrupts
from cgd_jax.runtime.errors import ConfigError, UserError
from cgd_jax.studies.report import read_result, write_report
from cgd_jax.studies.study import Run, Study

__all__ = ["Unfinished", "run_study"]

Cores = set[int] | None  # of a CPU; None: whatever there is

# Steps of a trial: enough for a rate once everything is compiled.
FIRST_STEPS = 12


class Unfinished(UserError):
    """Some runs of a study failed; the message says which and where to look."""


class Job(NamedTuple):
    """A run under way."""

    run: Run
    process: subprocess.Popen
    cores: Cores
    since: float  # time.time() of its start


def run_study(
    study: Study,
    runs: list[Run],
    command: list[str],
    workdir: str,
    jobs: int | None = None,
    dry_run: bool = False,
) -> None:
    """Trains what is not trained yet, and writes the comparison.

    `workdir` then holds a folder a run, and for the study NAME.md, NAME.csv and NAME.png,
    brought up to date after every run. Several studies of the same config may share it.

    Args:
      study: from `load`.
      runs: from `plan`.
      command: that trains the base config; a run's own flags are added to it.
      workdir: the folder of all runs.
      jobs: how many runs at a time share the cores of a CPU; None for one.
      dry_run: only lists the runs, how long they will take, and their commands.

    Raises:
      ConfigError: `jobs` is more than this machine can share out; nothing was started.
      Unfinished: runs failed; the others were trained.
      SystemExit: with the status `interrupts.EXIT_TEMPFAIL`, when SIGINT or SIGTERM ended it.
    """
    jax.config.update("jax_platforms", "cpu")  # the devices are for the runs
    places = share_cores(jobs)
    Path(workdir).mkdir(parents=True, exist_ok=True)
    waiting = [run for run in runs if not run.finished()]
    if dry_run:
        show_plan(runs, waiting, command, workdir, places)
        return
    console.log(
        f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished; {len(places)} at a time."
    )
    failed = {}
    if waiting:
        failed = train_all(waiting, command, places, lambda: write_report(study, runs, workdir))
    text = write_report(study, runs, workdir)
    if text:
        console.log(f"\n{text}\nLook at {study.name}.png and {study.name}.md in {workdir}.")
    if failed:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
        raise Unfinished(
            f"{len(failed)} of {len(runs)} runs failed; the same command tries them again:{listed}"
        )


def share_cores(jobs: int | None) -> list[Cores]:
    """Shares the cores of the CPU out evenly among the runs that are trained at a time.

    Args:
      jobs: how many; None for one.

    Returns:
      The cores of each. One run has whatever there is, accelerators too.

    Raises:
      ConfigError: there are not so many cores, or JAX trains on something else than a CPU.
    """
    if jobs in (None, 1):
        return [None]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    available = len(cores) or os.cpu_count() or 1
    if not 1 <= jobs <= available:
        raise ConfigError(f"--jobs={jobs}: this machine has {available} CPU cores to share out.")
    # Asked in a process of its own: one that has looked for devices holds their memory.
    code = "import jax; print(jax.default_backend())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if found.returncode:
        raise ConfigError(f"JAX finds no device: {found.stderr.strip().splitlines()[-1]}")
    platform = found.stdout.split()[-1]
    if platform != "cpu":
        raise ConfigError(
            f"--jobs={jobs}: only the cores of a CPU are shared out, and JAX trains on {platform} "
            f"here. Leave --jobs out to train one run at a time, or start the commands that "
            f"--dry_run prints, each on a device of its own."
        )
    return [set(cores[i::jobs]) or None for i in range(jobs)]


def train_all(
    waiting: list[Run], command: list[str], places: list[Cores], finished: Callable[[], object]
) -> dict[str, str]:
    """Trains runs, one after another at every place.

    Args:
      waiting: the runs.
      command: that trains the base config.
      places: from `share_cores`.
      finished: called after each run that ended well.

    Returns:
      Name of each run that failed → why.

    Raises:
      SystemExit: as for `run_study`.
    """
    failed, lost, queue, free, active = {}, [], list(waiting), list(places), []
    started, ended, told = time.time(), 0, False
    with (
        contextlib.ExitStack() as at_exit,
        interrupts.stop_signals() as stopped_by,
        console.progress(len(waiting), "study", "run", log_every=None) as bar,
    ):
        # A second Ctrl-C, or an error of this loop, leaves nobody to wait for them.
        at_exit.callback(lambda: [job.process.kill() for job in active])
        while active or (queue and not stopped_by):
            while queue and free and not stopped_by:
                run, cores = queue.pop(0), free.pop(0)
                active.append(Job(run, start(run, command, cores), cores, time.time()))
            if stopped_by and not told:
                told = True
                for job in active:
                    job.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            for job in [job for job in active if job.process.poll() is not None]:
                active.remove(job)
                free.append(job.cores)
                bar.update()
                ended += 1
                name, status = job.run.name(), job.process.returncode
                if status == 0:
                    left = (time.time() - started) / ended * (len(waiting) - ended)
                    recall = 100 * read_result(job.run)["metrics"]["recall@1"]
                    console.log(
                        f"{name}: R@1 {recall:.2f} %, {console.duration(time.time() - job.since)}; "
                        f"{ended} of {len(waiting)}, about {console.duration(left)} left"
                    )
                    finished()
                elif not stopped_by:
                    failed[name] = f"{last_words(job.run, status)} (see {job.run.folder}/log.txt)"
                    console.log(f"{name} failed: {failed[name]}")
                elif status != interrupts.EXIT_TEMPFAIL:
                    lost.append(f"\n  {name}: {last_words(job.run, status)}")
    if stopped_by:
        saved = "these runs go on from their last checkpoint:" if lost else "everything is saved."
        console.log(f"Stopped; the same command goes on, and {saved}{''.join(lost)}")
        raise SystemExit(interrupts.EXIT_TEMPFAIL)
    return failed


def flags_of(run: Run, changes: dict | None = None) -> list[str]:
    """Returns the flags that train a run, with `changes` (path → value) on top of its own."""
    return [f"--config.{key}={value}" for key, value in (run.overrides | (changes or {})).items()]


def start(
    run: Run, command: list[str], cores: Cores, changes: dict | None = None
) -> subprocess.Popen:
    """Starts the training of a run; what it prints goes to log.txt in its folder.

    Args:
      run: to be trained.
      command: that trains the base config.
      cores: that it may use.
      changes: path of a config key → value, on top of the run's own.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "log.txt", "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, *flags_of(run, changes), f"--workdir={run.folder}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C is passed on by the study, once
        )
    if cores:
        os.sched_setaffinity(process.pid, cores)
    return process


def last_words(run: Run, status: int) -> str:
    """Returns how a failed run ended."""
    log = (run.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    lines = log.strip().splitlines() or ["it said nothing"]
    return f"exit status {status}, {lines[-1][:300]}"


def show_plan(
    runs: list[Run], waiting: list[Run], command: list[str], workdir: str, places: list[Cores]
) -> None:
    """Lists the runs with an estimate of their time, and the commands of those that wait.

    The first steps of every variant are trained for it, once: first_steps.json keeps what
    they took, by the flags of the runs without their seed.

    Args:
      runs: all runs of the study.
      waiting: those that are not finished.
      command: that trains the base config.
      workdir: the folder of all runs.
      places: from `share_cores`.
    """
    path = Path(workdir, "first_steps.json")
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows, total, is_flag = [], 0.0, lambda argument: argument.startswith("--")
    for run in console.counted(runs, "first steps", "run"):
        state, left = "finished", 0.0
        if run in waiting:
            flags = {*filter(is_flag, command), *flags_of(run)} - {f"--config.seed={run.seed}"}
            key = shlex.join(sorted(flags))
            if key not in known:
                known[key] = time_first_steps(run, command, workdir, places[0])
                files.write_json(path, known)
            fixed, per_step = known[key]
            history, steps = read_history(run.folder / "history.csv"), run.config.train.steps
            done = int(history[-1]["step"]) if history else 0
            left = fixed + per_step * (steps - done)
            state = f"step {done} of {steps}" if done else "not begun"
        total += left
        rows.append([run.variant, str(run.seed), state, console.duration(left)])
    console.log(table(["variant", "seed", "state", "time left"], rows))
    text = (
        f"About {console.duration(total / len(places))}, {len(places)} at a time. No run was "
        f"started."
    )
    if waiting:
        text += (
            " To train them elsewhere, each on a device of its own, start these from this folder; "
            "the study compares what is finished."
        )
    console.log(f"\n{console.fold(text)}\n")
    for run in waiting:
        console.log(shlex.join([*command, *flags_of(run), f"--workdir={run.folder}"]))


def time_first_steps(
    run: Run, command: list[str], workdir: str, cores: Cores
) -> tuple[float, float]:
    """Trains the first steps of a run in a folder that is thrown away, and evaluates.

    Args:
      run: to be tried.
      command: that trains the base config.
      workdir: where the folder is made.
      cores: that it may use.

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
        trial = run._replace(folder=Path(folder))
        started = time.time()
        process = start(trial, command, cores, short)
        try:
            status = process.wait()
        finally:
            process.kill()
            process.wait()
        if status:
            raise Unfinished(f"The first steps of {run.name()} failed: {last_words(trial, status)}")
        seconds = time.time() - started
        rate = read_history(trial.folder / "history.csv")[-1]["images_per_second"]
    images = run.config.train.classes_per_batch * run.config.train.images_per_class
    return seconds - FIRST_STEPS * images / rate, images / rate
