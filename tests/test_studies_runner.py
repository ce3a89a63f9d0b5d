"""Studies: every run is trained, whatever happens meanwhile, and compared in the end."""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from matplotlib.text import Text

from cgd_jax.data.load import load_dataset
from cgd_jax.runtime.errors import UserError
from cgd_jax.studies import runner
from cgd_jax.studies.report import read_values
from cgd_jax.studies.study import plan
from configs import glyphs
from tests import test_main
from tests.test_studies_study import TWO


@pytest.mark.slow
def test_whole_study(tiny_config, tmp_path, drawn):
    load_dataset(tiny_config.data)
    data = f"--config.data.dir={tiny_config.data.dir}"
    flags = ["--mode=study", "--study", "tests/tiny_study.py", data, f"--workdir={tmp_path}/s"]
    flags += ["--seeds=5", "--jobs=2", "--config.eval.baselines=False"]
    status, output, errors = test_main.run_here(*flags)
    assert status == 0 and errors == "", errors + output
    assert "2 runs, 0 of them finished." in output
    assert re.search(r"rank, seed 5: R@1 \d+\.\d\d %; \d of 2, about .+ s left", output)
    text = (tmp_path / "s" / "tiny_study.md").read_text()
    assert "Measured after 12 steps, chosen by: last step." in text
    assert "**Warning:** seeds that all variants have: 1." in text
    assert (tmp_path / "s" / "tiny_study.csv").read_text().count("\n") == 3
    assert {"rank", "both"} < {found.get_text() for found in drawn[-1].findobj(Text)}


# Stands for main.py: a training of no time, which fails or waits to be told to stop.
TRAINING = """
import json, pathlib, signal, sys, time
flags = dict(argument.lstrip("-").split("=", 1) for argument in sys.argv[1:] if "--" in argument)
if flags.get("mode") == "eval":  # of several runs
    first, second = map(pathlib.Path, sys.argv[2:])
    if (first.parent / "fail").exists():
        sys.exit("error: no more memory")
    joined = {"recall@1": 0.9, "map@r": 0.8, "dimension": 504}
    (first / "together.json").write_text(json.dumps({"one": {}, "joined": joined, "PCA": joined}))
    sys.exit()
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
result = {"step": 1000, "metrics": metrics, "geometry": {}, "with options": other}
result["classes"] = {"tested": 9, "trained on": 0}
(folder / "results.json").write_text(json.dumps(result))
"""


@pytest.fixture
def command(tmp_path):
    path = tmp_path / "training.py"
    path.write_text(TRAINING)
    return [sys.executable, str(path)]


def study_runs(folder):
    return plan(TWO, glyphs.get_config(), {}, str(folder))


def test_one_failure_does_not_end_a_study(tmp_path, command, capsys):
    runs = study_runs(tmp_path)
    (tmp_path / "fail").touch()
    with pytest.raises(UserError, match="2 of 4 runs failed; the same command .* again:") as failed:
        runner.run_study(TWO, runs, command, str(tmp_path), jobs=2)
    assert "both, seed 1: exit status 1, error: no more disk (see " in str(failed.value)
    assert "Failed: both, seed 1: exit status 1" in capsys.readouterr().out
    assert len(read_values(tmp_path / "two.csv")) == 2 * 2

    # The same command trains the rest, and the report has everything.
    (tmp_path / "fail").unlink()
    runner.run_study(TWO, runs, command, str(tmp_path))
    assert "4 runs, 2 of them finished." in capsys.readouterr().out
    text = (tmp_path / "two.md").read_text()
    assert "Seeds 0, 1;" in text and "## Vector: first_descriptor" in text
    assert "| rank |       2 | 55.00 ± 63.53 | -20.00 ± 0.00 * |" in text


def test_jobs_are_trained_at_a_time(tmp_path, command):
    """Each waits until another one has begun."""
    meet = """
while len([*folder.parent.glob("*/begun")]) < 2:
    time.sleep(0.02)
"""
    begin = '(folder / "begun").touch()'
    Path(command[1]).write_text(TRAINING.replace("recall = ", f"{begin}{meet}recall = ", 1))
    assert runner.train_all(study_runs(tmp_path), command, 2, lambda: None) == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_study_passes_signals_on_and_goes_on(tmp_path, command, capsys, jobs):
    runs = study_runs(tmp_path)
    (tmp_path / "wait").touch()

    def interrupt():
        while not all((run.folder / "begun").exists() for run in runs[:jobs]):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    with pytest.raises(SystemExit) as stopped:
        runner.train_all(runs, command, jobs, lambda: None)
    assert stopped.value.code == 75
    assert "the same command goes on from the last checkpoint" in capsys.readouterr().out
    assert not any(run.finished() for run in runs)
    assert not any(run.folder.exists() for run in runs[jobs:]), "no other run was begun"
    (tmp_path / "wait").unlink()
    assert runner.train_all(runs, command, jobs, lambda: None) == []
    assert all(run.finished() for run in runs)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_no_training_behind(tmp_path, command, monkeypatch, error):
    """Nor does a second Ctrl-C."""
    runs = study_runs(tmp_path)
    script = 'if "seed=0" not in sys.argv[-1]: time.sleep(60)\nfolder, seed'
    Path(command[1]).write_text(TRAINING.replace("folder, seed", script, 1))
    started, start = [], subprocess.Popen

    def popen(*arguments, **options):
        started.append(start(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)

    def finished():
        raise error

    with pytest.raises(error):
        runner.train_all(runs, command, 3, finished)
    assert len(started) >= 3 and -signal.SIGKILL in [process.returncode for process in started]
    assert None not in [process.returncode for process in started], "all have ended"


def test_a_dry_run_prints_commands_that_train(tmp_path, command, capsys):
    workdir = tmp_path / "a folder"
    runner.run_study(TWO, study_runs(workdir), command, str(workdir), dry_run=True)
    count, *commands = capsys.readouterr().out.splitlines()
    assert count == "4 runs, 0 of them finished." and len(commands) == 4
    assert not workdir.exists(), "nothing is trained"
    for one in commands:  # the folder is what it would have made
        Path(shlex.split(one)[-1].partition("=")[2]).mkdir(parents=True)
        subprocess.run(one, shell=True, check=True)
    runner.run_study(TWO, study_runs(workdir), command, str(workdir), dry_run=True)
    assert capsys.readouterr().out == "4 runs, 4 of them finished.\n"
    runner.run_study(TWO, study_runs(workdir), command, str(workdir))
    assert "Seeds 0, 1;" in (workdir / "two.md").read_text()


def test_runs_are_measured_together_once_all_are_trained(tmp_path, command, capsys):
    study = TWO._replace(together={"two": ("rank", "both")})
    runs = plan(study, glyphs.get_config(), {}, str(tmp_path))
    runner.train_all(runs, command, 2, lambda: None)
    (tmp_path / "fail").touch()
    with pytest.raises(UserError, match="two could not be measured: error: no more memory"):
        runner.run_study(study, runs, command, str(tmp_path))
    (tmp_path / "fail").unlink()
    runner.run_study(study, runs, command, str(tmp_path))
    found = {(row["variant"], row["seed"]) for row in read_values(tmp_path / "two.csv")}
    assert {("two, concatenated", "1"), ("two, separated", "0")} < found and len(found) == 10
    assert not list(tmp_path.glob("*/together.json")), "another ensemble may have the same member"
    capsys.readouterr()
    runner.run_study(study, runs, command, str(tmp_path))
    assert "measured together" not in capsys.readouterr().out, "once"


def test_last_words_are_short():
    said = runner.last_line(f"begins\nerror: no {999 * 'x'}\n")
    assert said.startswith("error: no xxx") and len(said) == 300
    assert runner.last_line("") == "it said nothing"
