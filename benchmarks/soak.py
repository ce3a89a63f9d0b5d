"""A run that is killed again and again ends as one that nobody touched, bit for bit.

    python benchmarks/soak.py

The same command trains in two work folders. One run is left alone; the other is ended by SIGKILL
at random moments, while it starts, trains, or writes a checkpoint, and started again. Then the
last states (parameters, statistics, optimizer), the histories but for times, and the results are
compared. Flags of main.py may follow. The exit status is 1 if anything differs.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))
from cgd_jax import checkpoint
from cgd_jax.reports.history import read_history
from cgd_jax.run import create_run
from cgd_jax.workdir import read_config

ROOT = Path(__file__).parents[1]
# Much is saved, and so much is there to be interrupted. A row of the history is a mean over the
# steps since the last one or the last start: they are equal if every checkpoint ends a row.
FLAGS = {"steps": 420, "log_every": 7, "checkpoint_every": 7, "eval_every": 70}
TIMES = ("images_per_second", "input_wait", "tflops_per_second", "share_of_peak")
MOMENTS = ("starting", "training", "saving")


def kill(command: list[str], workdir: Path, moment: str, rng: random.Random) -> bool:
    """Starts a run and kills it at one of `MOMENTS`; False if it ended before."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if moment == "starting":
        time.sleep(rng.uniform(0, 12))
    else:
        next((line for line in process.stdout if line.startswith("First step after")), None)
        time.sleep(rng.uniform(0, 3))
    if moment == "saving":
        while process.poll() is None and not any(workdir.glob("checkpoints/*-tmp")):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.02))
    process.kill()
    process.communicate()
    return process.returncode == -9


def last_state(workdir: Path) -> dict[str, bytes]:
    """All arrays of the state that a run ended with, by name."""
    template = create_run(read_config(workdir), str(workdir)).state_shapes()
    with checkpoint.manager(str(workdir)) as checkpoints:
        state = checkpoint.restore(checkpoints, template, checkpoints.latest_step())
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def history(workdir: Path) -> dict[tuple, float]:
    """The values of a history, but for times."""
    rows = read_history(workdir / "history.csv")
    return {(row["step"], k): v for row in rows for k, v in row.items() if k not in TIMES}


def results(workdir: Path) -> dict:
    """What a run measured at its end, but for times."""
    found = json.loads((workdir / "results.json").read_text())
    del found["costs"]["embed_seconds"]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--config", default="configs/glyphs.py")
    args, others = parser.parse_known_args()
    flags = [f"--config.train.{name}={value}" for name, value in FLAGS.items()]
    command = [sys.executable, "main.py", f"--config={args.config}", *flags, *others]
    rng, kills, started = random.Random(args.seed), Counter(), time.time()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        alone, killed = Path(folder, "alone"), Path(folder, "killed")
        quiet = {"cwd": ROOT, "check": True, "stdout": subprocess.DEVNULL}
        subprocess.run([*command, f"--workdir={alone}"], **quiet)
        command.append(f"--workdir={killed}")
        for _ in range(args.kills):
            moment = rng.choice(MOMENTS)
            if not kill(command, killed, moment, rng):
                print("the run ended before it was killed often enough: give it more steps")
                break
            kills[moment] += 1
            saved = [int(p.name) for p in killed.glob("checkpoints/*") if p.name.isdigit()]
            print(f"killed while {moment}; latest checkpoint: {max(saved, default=0)}", flush=True)
        subprocess.run(command, **quiet)
        rows = []
        for what in (last_state, history, results):
            ours, theirs = what(alone), what(killed)
            names = ours.keys() | theirs.keys()
            differing = sum(ours.get(name) != theirs.get(name) for name in names)
            rows.append([what.__name__.replace("_", " "), len(names), differing])
    listed = ", ".join(f"{count} while {moment}" for moment, count in sorted(kills.items()))
    print(f"\n{kills.total()} kills: {listed}; {time.time() - started:.0f} s")
    print(tabulate(rows, ["", "values", "that differ"]))
    sys.exit(any(row[-1] for row in rows) or kills.total() < args.kills)


if __name__ == "__main__":
    main()
