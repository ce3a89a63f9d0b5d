"""Studies: every run is trained, whatever happens meanwhile, and compared in the end."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cgd_jax.data.load import load_dataset
from cgd_jax.runtime.errors import ConfigError
from cgd_jax.studies import runner
from cgd_jax.studies.report import write_report
from cgd_jax.studies.study import plan
from configs import glyphs
from tests import test_main
from tests.test_studies_study import TWO


def test_whole_study(tiny_config, tmp_path):
    load_dataset(tiny_config.data)
    data = f"--config.data.dir={tiny_config.data.dir}"
    flags = ["--mode=study", "--study", "tests/tiny_study.py", data, f"--workdir={tmp_path}/s"]
    flags += ["--seeds=5", "--jobs=2", "--config.eval.baselines=False"]
    status, output, errors = test_main.run_here(*flags)
    assert status == 0 and errors == "", errors + output
    assert "2 runs, 0 of them finished; 2 at a time." in output
    assert re.search(r"rank, seed 5: R@1 \d+\.\d\d %, .+ s; \d of 2, about .+ s left", output)
    assert "12 steps, seeds 5; 2 of 2 runs are finished" in output
    assert "**Warning:** there are variants with 1 seed." in output
    for name in ("tiny_study.md", "tiny_study.csv", "tiny_study.png"):
        assert (tmp_path / "s" / name).stat().st_size > 500


# Stands for main.py: a training of no time, which fails or waits to be told to stop.
TRAINING = """
import json, pathlib, signal, sys, time
flags = dict(argument.lstrip("-").split("=", 1) for argument in sys.argv[1:])
folder, seed = pathlib.Path(flags["workdir"]), int(flags["config.seed"])
if (folder.parent / "fail").exists() and seed == 1:
    sys.exit("error: no more disk")
if (folder.parent / "wait").exists():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (folder / "begun").touch()
    time.sleep(60)
recall = 0.5 + 0.1 * seed + 0.2 * float(flags.get("config.loss.classification_weight", 1))
metrics = {"recall@1": recall, "map@r": recall / 2, "queries": 9}
other = {"first_descriptor": {"recall@1": recall / 2, "map@r": recall / 4}}
(folder / "history.csv").write_text("step,images_per_second\\n500,64\\n1000,128\\n")
result = json.dumps({"step": 1000, "metrics": metrics, "with options": other})
(folder / "results.json").write_text(result)
"""


@pytest.fixture
def command(tmp_path):
    path = tmp_path / "training.py"
    path.write_text(TRAINING)
    return [sys.executable, str(path)]


def test_one_failure_does_not_end_a_study(tmp_path, command, capsys):
    runs = plan(TWO, glyphs.get_config(), {}, str(tmp_path))
    (tmp_path / "fail").touch()
    places = [None, None]
    finished = []
    failed = runner.train_all(runs, command, places, lambda: finished.append(1))
    assert failed.keys() == {"rank, seed 1", "both, seed 1"} and len(finished) == 2
    assert "exit status 1, error: no more disk (see " in failed["both, seed 1"]
    assert "both, seed 1 failed: exit status 1" in capsys.readouterr().out
    text = write_report(TWO, runs, str(tmp_path))
    assert "2 of 4 runs are finished" in text and "variants with 1 seed." in text

    # The same command trains the rest, and the report has everything.
    (tmp_path / "fail").unlink()
    waiting = [run for run in runs if not run.finished()]
    assert runner.train_all(waiting, command, places[:1], lambda: None) == {}
    write_report(TWO, runs, str(tmp_path))
    text = (tmp_path / "two.md").read_text()
    assert "4 of 4 runs are finished" in text and "## Vector: first_descriptor" in text
    assert "| rank |       2 | 55.00 ± 63.53 | -20.00 ± 0.00 * |" in text
    # 500 steps of 64 images at 64 images/s, 500 at 128.
    assert text.count(" 750 s ") == 4
    with open(tmp_path / "two.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and {row["vector"] for row in rows} == {"embedding", "first_descriptor"}
    assert (tmp_path / "two.png").stat().st_size > 1000


@pytest.mark.parametrize("status,said", [(75, "everything is saved."), (1, "rank, seed 0: exit")])
def test_a_study_passes_signals_on_and_goes_on(tmp_path, command, capsys, status, said):
    script = Path(command[1])
    script.write_text(TRAINING.replace("sys.exit(75)", f"sys.exit({status})"))
    runs = plan(TWO, glyphs.get_config(), {}, str(tmp_path))
    (tmp_path / "wait").touch()

    def interrupt():
        while not (runs[0].folder / "begun").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    with pytest.raises(SystemExit) as stopped:
        runner.train_all(runs, command, [None], lambda: None)
    assert stopped.value.code == 75 and said in capsys.readouterr().out
    assert not any(run.finished() for run in runs)
    assert not any(run.folder.exists() for run in runs[1:]), "no other run was begun"
    (tmp_path / "wait").unlink()
    assert runner.train_all(runs, command, [None], lambda: None) == {}
    assert all(run.finished() for run in runs)


def test_time_of_the_first_steps(tmp_path, monkeypatch):
    """An estimate is the short run's time with its steps' share scaled up."""
    run = plan(TWO, glyphs.get_config(), {}, str(tmp_path))[0]

    def start(short, command, place, changes):
        assert changes["train.steps"] == runner.FIRST_STEPS
        history = "step,images_per_second\n4,1\n8,64\n12,640\n"
        (short.folder / "history.csv").write_text(history)
        return subprocess.Popen(["sleep", "2"])

    monkeypatch.setattr(runner, "start", start)
    fixed, per_step = runner.time_first_steps(run, [], str(tmp_path), None)
    assert per_step == 64 / 640
    assert 2 - 12 * per_step <= fixed < 2.5 - 12 * per_step
    assert list(tmp_path.iterdir()) == []


def dry_run(study, workdir, command, capsys):
    """What --dry_run prints."""
    runs = plan(study, glyphs.get_config(), {}, str(workdir))
    runner.run_study(study, runs, command, str(workdir), dry_run=True)
    return capsys.readouterr().out


def test_a_dry_run_prints_commands_that_train(tmp_path, command, capsys):
    workdir = tmp_path / "a folder"
    output = dry_run(TWO, workdir, command, capsys)
    assert re.search(r"About [\d.]+ (min \d\d )?s, 1 at a time. No run was started.", output)
    assert not [path for path in workdir.iterdir() if path.is_dir()]
    commands = [line for line in output.splitlines() if line.startswith(command[0])]
    assert len(commands) == 4
    for one in commands:  # the folder is what it would have made
        workdir.joinpath(shlex.split(one)[-1].partition("=")[2]).mkdir()
        subprocess.run(one, shell=True, check=True)
    output = dry_run(TWO, workdir, command, capsys)
    assert output.count("finished") == 4 and "About 0.0 s" in output and command[0] not in output
    runner.run_study(TWO, plan(TWO, glyphs.get_config(), {}, str(workdir)), command, str(workdir))
    output = capsys.readouterr().out
    assert "4 runs, 4 of them finished" in output and "4 of 4 runs are finished" in output


def test_estimates_belong_to_what_a_variant_changes(tmp_path, command, capsys):
    """Not to its name: another study in the same folder may use it for something else."""
    other = TWO._replace(variants={"rank": {"loss.smoothing": 0.3}, "both": {}})
    counts = []
    for study in (TWO, TWO, other):
        dry_run(study, tmp_path / "s", command, capsys)
        counts.append(len(json.loads((tmp_path / "s" / "first_steps.json").read_text())))
    assert counts == [2, 2, 3]


def test_first_steps_that_fail(tmp_path):
    command = [
        sys.executable,
        "-c",
        "print('begins'); import sys; sys.exit('error: no ' + 999 * 'x')",
    ]
    (run, *_) = plan(TWO, glyphs.get_config(), {}, str(tmp_path))
    with pytest.raises(runner.Unfinished) as failed:
        runner.time_first_steps(run, command, str(tmp_path), None)
    said = str(failed.value)
    assert said.startswith("The first steps of rank, seed 0 failed: exit status 1, error: no xxx")
    assert len(said) < 400 and "see " not in said and not list(tmp_path.iterdir())


def test_an_error_leaves_no_training_behind(tmp_path, command):
    runs = plan(TWO, glyphs.get_config(), {}, str(tmp_path))
    slow = [*command[:1], "-c", "import time; time.sleep(60)"]
    started = []

    def start(run, command, cores):
        if started:
            raise OSError("no more processes")
        started.append(subprocess.Popen(slow))
        return started[0]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
        patch.setattr(runner, "start", start)
        runner.train_all(runs, command, [None, None], lambda: None)
    assert started[0].wait(timeout=10) == -signal.SIGKILL


def test_the_cores_of_a_cpu_are_shared_out(monkeypatch):
    assert runner.share_cores(None) == runner.share_cores(1) == [None]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5, 7}, raising=False)
    with pytest.raises(ConfigError, match="--jobs=6: this machine has 5 CPU cores"):
        runner.share_cores(6)
    with pytest.raises(ConfigError, match="--jobs=0"):
        runner.share_cores(0)
    platform = lambda name: lambda *_, **__: SimpleNamespace(returncode=0, stdout=f"{name}\n")
    monkeypatch.setattr(subprocess, "run", platform("cpu"))
    assert runner.share_cores(2) == [{0, 2, 7}, {1, 5}]
    monkeypatch.setattr(subprocess, "run", platform("gpu"))
    with pytest.raises(ConfigError, match="JAX trains on gpu here. Leave --jobs out"):
        runner.share_cores(2)
