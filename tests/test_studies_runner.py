"""Studies: which runs they are made of, that they end as they would undisturbed."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cgd_jax.config import ConfigError
from cgd_jax.studies import runner
from configs import glyphs
from tests.test_main import run

STUDIES = sorted(path.stem for path in Path(runner.FOLDER).glob("*.py"))


@pytest.fixture
def two():
    variants = {"rank": {"loss.classification_weight": 0.0}, "both": {}}
    return runner.Study("two", "Which?", "configs/glyphs.py", "both", variants, (0, 1))


@pytest.mark.parametrize("name", STUDIES)
def test_studies_that_come_along_can_be_run(name, tmp_path):
    loaded = runner.load(name)
    runs = runner.plan(loaded, glyphs.get_config(), {}, str(tmp_path))
    assert len(runs) == len(loaded.variants) * len(loaded.seeds) and len(loaded.seeds) >= 3
    assert len(loaded.question) > 20 and Path(loaded.config).exists()


def test_the_papers_descriptor_sets():
    sets = set(runner.load("descriptors").variants)
    assert sets - {"R"} == set("S M G SM MS SG GS MG GM SMG MSG GSM".split())


def test_plan(two, tmp_path):
    config = glyphs.get_config()
    runs = runner.plan(two, config, {}, str(tmp_path))
    assert [run.name() for run in runs] == [
        "rank, seed 0", "both, seed 0", "rank, seed 1", "both, seed 1",
    ]  # fmt: skip
    assert [run.folder.name for run in runs[:2]] == [
        "loss.classification_weight=0.0,seed=0",
        "seed=0",
    ]
    assert runs[2].config.loss.classification_weight == 0 and runs[2].config.seed == 1
    assert runs[1].config.train.eval_every == config.train.steps, (
        "nothing is chosen on test classes"
    )
    assert config.loss.classification_weight == 0.1 and config.seed == 0, "the base is as it was"
    some = runner.plan(two, config, {}, str(tmp_path), ["both"], [7])
    assert [run.folder.name for run in some] == ["seed=7"]


def test_studies_share_runs(tmp_path):
    folders = [
        {
            run.folder
            for run in runner.plan(runner.load(name), glyphs.get_config(), {}, str(tmp_path))
        }
        for name in ("descriptors", "losses", "auxiliary", "combination")
    ]
    assert len(set.intersection(*folders)) == 3, "the reference of all of them"


@pytest.mark.parametrize(
    "variants,given,chosen,message",
    [
        ({"x": {"loss.nothing": 1}}, {}, None, "two, variant x: .*nothing"),
        ({"x": {"loss.temperature": 0.0}}, {}, None, r"two, variant x: loss\.temperature=0\.0"),
        ({"x": {"train.steps": "many"}}, {}, None, "two, variant x: .*steps"),
        ({"x": {"seed": 3}}, {}, None, "varies the seed itself"),
        ({"x": {"loss.classification_weight": 0.1}}, {}, None, "are the same experiment"),
        ({}, {"seed": 1}, None, "--config.seed was given, but it is what two varies"),
        ({}, {"loss.classification_weight": 1}, None, "is what two varies"),
        ({}, {}, ["rank"], "lacks both"),
        ({}, {}, ["both", "other"], "two has no other"),
        ({}, {}, ["both", "both"], "names one twice"),
    ],
)
def test_mistakes_are_found_before_anything_runs(two, tmp_path, variants, given, chosen, message):
    bad = two._replace(variants=two.variants | variants)
    with pytest.raises(ConfigError, match=message):
        runner.plan(bad, glyphs.get_config(), given, str(tmp_path), chosen)


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "AttributeError.*It needs CONFIG"),
        ("1 +", "SyntaxError"),
        ("CONFIG, SEEDS, VARIANTS, REFERENCE = '', (0,), {'a': {}}, 'b'", "'b' is none of .* a"),
        ("CONFIG, SEEDS, VARIANTS, REFERENCE = '', (), {'a': {}}, 'a'", "SEEDS"),
    ],
)
def test_files_that_are_no_studies(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        runner.load(str(path))


def test_a_folder_with_another_run_is_refused(two, tmp_path):
    folder = tmp_path / "seed=0"
    folder.mkdir()
    values = json.loads(glyphs.get_config().to_json())
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="train.eval_every: 500 → 1000"):
        runner.plan(two, glyphs.get_config(), {}, str(tmp_path))


def test_whole_study(tmp_path):
    data = f"--config.data.dir={tmp_path}/data"
    assert run("--mode=data", "--config=tests/tiny.py", data, f"--workdir={tmp_path}/d")[0] == 0
    flags = ["--mode=study", "--study=tests/tiny_study.py", data, f"--workdir={tmp_path}/s"]
    status, output, errors = run(*flags, "--seeds=5", "--jobs=2")
    assert status == 0 and errors == "", errors + output
    assert "2 runs, 0 of them finished; 2 at a time." in output
    assert re.search(r"rank, seed 5: R@1 \d+\.\d\d %, \d+ s; \d of 2, about \d+ min left", output)
    assert "12 steps, seeds 5; 2 of 2 runs are finished" in output
    assert "**Warning:** there are variants with 1 seed." in output
    for name in ("tiny_study.md", "tiny_study.csv", "tiny_study.png"):
        assert (tmp_path / "s" / name).stat().st_size > 500
    # All is finished: nothing is left to estimate, and nothing is started.
    status, output, errors = run(*flags, "--seeds=5", "--dry_run")
    assert status == 0 and "About 0 min, 1 at a time. Nothing was started." in output


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


def test_one_failure_does_not_end_a_study(two, tmp_path, command, capsys):
    runs = runner.plan(two, glyphs.get_config(), {}, str(tmp_path))
    (tmp_path / "fail").touch()
    places = [runner.Place({}, None)] * 2
    finished = []
    failed = runner.train_all(runs, command, places, lambda: finished.append(1))
    assert failed.keys() == {"rank, seed 1", "both, seed 1"} and len(finished) == 2
    assert "exit status 1, error: no more disk (see " in failed["both, seed 1"]
    assert "both, seed 1 failed: exit status 1" in capsys.readouterr().out
    text = runner.write_report(two, runs, str(tmp_path))
    assert "2 of 4 runs are finished" in text and "variants with 1 seed." in text

    # The same command trains the rest, and the report has everything.
    (tmp_path / "fail").unlink()
    waiting = [run for run in runs if not run.finished()]
    assert runner.train_all(waiting, command, places[:1], lambda: None) == {}
    text = runner.write_report(two, runs, str(tmp_path))
    assert "4 of 4 runs are finished" in text and "## Vector: first_descriptor" in text
    assert "| rank |       2 | 55.00 ± 63.53 | -20.00 ± 0.00 * |" in text
    # 500 steps of 64 images at 64 images/s, 500 at 128.
    assert text.count(" 750 s ") == 4
    with open(tmp_path / "two.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and {row["vector"] for row in rows} == {"embedding", "first_descriptor"}
    assert (tmp_path / "two.png").stat().st_size > 1000


def test_a_study_passes_signals_on_and_goes_on(two, tmp_path, command):
    runs = runner.plan(two, glyphs.get_config(), {}, str(tmp_path))
    (tmp_path / "wait").touch()

    def interrupt():
        while not (runs[0].folder / "begun").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    with pytest.raises(SystemExit) as stopped:
        runner.train_all(runs, command, [runner.Place({}, None)], lambda: None)
    assert stopped.value.code == 75
    assert not any(run.finished() for run in runs)
    assert not any(run.folder.exists() for run in runs[1:]), "no other run was begun"
    (tmp_path / "wait").unlink()
    assert runner.train_all(runs, command, [runner.Place({}, None)], lambda: None) == {}
    assert all(run.finished() for run in runs)


def test_time_of_the_first_steps(two, tmp_path, monkeypatch):
    """An estimate is the short run's time with its steps' share scaled up."""
    run = runner.plan(two, glyphs.get_config(), {}, str(tmp_path))[0]

    def start(short, command, place, changes):
        assert changes["train.steps"] == runner.FIRST_STEPS
        history = "step,images_per_second\n4,1\n8,64\n12,640\n"
        (short.folder / "history.csv").write_text(history)
        return subprocess.Popen(["sleep", "2"])

    monkeypatch.setattr(runner, "start", start)
    fixed, per_step = runner.time_first_steps(run, [], str(tmp_path), runner.Place({}, None))
    assert per_step == 64 / 640
    assert 2 - 12 * per_step <= fixed < 2.5 - 12 * per_step
    assert list(tmp_path.iterdir()) == []


def test_places_share_the_cores():
    places = runner.find_places(2)
    assert len(places) == 2 and not places[0].cores & places[1].cores
    with pytest.raises(ConfigError, match="--jobs=9999: this machine has"):
        runner.find_places(9999)
