"""Trains the runs of a study, each in a process of its own: `cgd_jax study descriptors`."""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import jax

from cgd_jax.runtime import console, interrupts
from cgd_jax.runtime.errors import UserError
from cgd_jax.studies.report import measured, write_report
from cgd_jax.studies.study import Run, ensembles
from cgd_jax.study_files import Study


def run_study(
    study: Study,
    runs: list[Run],
    command: list[str],
    workdir: str,
    jobs: int = 1,
    dry_run: bool = False,
) -> None:
    """Trains what is not trained yet, each run in a folder of `workdir`, and writes the comparison.

    `command` trains the base config; a run's own flags are added. On a CPU `jobs` runs share it; an
    accelerator has memory for one. `dry_run` only prints the commands, for example to start each on
    a device of its own. Raises UserError with the runs that failed, SystemExit after a signal.
    """
    jax.config.update("jax_platforms", "cpu")  # the devices are for the runs
    waiting = [run for run in runs if not run.finished()]
    console.log(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished.")
    if dry_run:
        for run in waiting:
            console.log(shlex.join(command_of(run, command)))
        return
    Path(workdir).mkdir(parents=True, exist_ok=True)
    failed = train_all(waiting, command, jobs, lambda: write_report(study, runs, workdir))
    for name, members, path in ensembles(study, runs, workdir):
        if not path.exists() and all(run.finished() for run in members):
            measure_together(name, members, path, command)
    if table := write_report(study, runs, workdir):
        console.log(f"\n{table}\n\nLook at {study.name}.md and {study.name}.png in {workdir}.")
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed; the same command tries them again:"
            + "".join(f"\n  {reason}" for reason in failed)
        )


def command_of(run: Run, command: list[str]) -> list[str]:
    """Returns the command that trains a run; see `run_study`."""
    flags = [f"--config.{key}={value}" for key, value in run.overrides.items()]
    return [*command, *flags, f"--workdir={run.folder}"]


def train_all(
    waiting: list[Run], command: list[str], jobs: int, finished: Callable[[], object]
) -> list[str]:
    """Trains runs, `jobs` at a time, and calls `finished` after each; returns a line a failure."""
    failed, started = [], time.time()
    with interrupts.stop_signals() as stopped_by, ThreadPoolExecutor(jobs) as pool:
        try:
            futures = {pool.submit(train, run, command, stopped_by): run for run in waiting}
            for ended, future in enumerate(as_completed(futures), 1):
                run, status = futures[future], future.result()
                if status == 0:
                    recall = 100 * measured(run)[0]["recall@1"]
                    left = (time.time() - started) / ended * (len(waiting) - ended)
                    console.log(
                        f"{run.name()}: R@1 {recall:.2f} %; {ended} of {len(waiting)}, about "
                        f"{console.duration(left)} left"
                    )
                    finished()
                elif not stopped_by:
                    path = run.folder / "log.txt"
                    said = last_line(path.read_text(encoding="utf-8", errors="replace"))
                    failed.append(f"{run.name()}: exit status {status}, {said} (see {path})")
                    console.log(f"Failed: {failed[-1]}")
        except BaseException:  # a second Ctrl-C, or an error here: nobody would wait for them
            stopped_by.append(signal.SIGKILL)
            raise
    if stopped_by:
        console.log("Stopped; the same command goes on from the last checkpoint of every run.")
        raise SystemExit(interrupts.EXIT_TEMPFAIL)
    return failed


def train(run: Run, command: list[str], stopped_by: list[int]) -> int | None:
    """Trains a run in a process, which is sent whatever signals come; log.txt has what it prints.

    Returns the exit status; None if a signal had come before.
    """
    if stopped_by:
        return None
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "log.txt", "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command_of(run, command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # else a Ctrl-C would reach it twice
        )
    passed_on = 0
    while process.poll() is None:
        for number in stopped_by[passed_on:]:
            process.send_signal(number)
            passed_on += 1
        time.sleep(0.1)
    return process.returncode


def measure_together(name: str, members: list[Run], path: Path, command: list[str]) -> None:
    """Measures an ensemble in a process, like `cgd_jax eval RUN RUN`."""
    console.log(f"{name}, seed {members[0].seed}: measured together.")
    eval_command = [*command, "--mode=eval", *(str(run.folder) for run in members)]
    done = subprocess.run(eval_command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{name} could not be measured: {last_line(done.stderr)}")
    os.replace(members[0].folder / "together.json", path)


def last_line(log: str) -> str:
    """Returns what a process said last."""
    return (log.strip() or "it said nothing").splitlines()[-1][:300]
