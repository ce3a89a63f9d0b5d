"""Whole commands, as a user types them."""

import contextlib
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

import cgd_jax
from cgd_jax import __main__ as cli
from cgd_jax.reports import plots
from cgd_jax.reports.history import read_history

ROOT = Path(__file__).parents[1]


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "main.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments):
    """Returns the status, the output and the errors of a command."""
    process = start(*arguments)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def run_here(*arguments, folder=ROOT):
    """What `run` returns, from this process, in which JAX is imported and has compiled already.

    Log handlers and signal handlers are left as they were.
    """
    output, errors, status = io.StringIO(), io.StringIO(), 0
    loggers = [(log, log.handlers, log.level) for log in map(logging.getLogger, ("", "cgd_jax"))]
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(errors),
        ):
            cli.main(["main.py", *arguments])
    except SystemExit as end:
        status = end.code or 0
        if isinstance(end.code, str):  # which Python itself would print
            status = 1
            print(end.code, file=errors)
    finally:
        for log, handlers, level in loggers:
            log.handlers, log.propagate = handlers, True
            log.setLevel(level)
        signal.signal(signal.SIGTERM, terminate)
    return status, output.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "error: say what to run: python main.py --config=glyphs, for example; --help lists"),
        (
            ["--config=configs/glyphs.py", "--config.train.step=4"],
            "error: --config.train.step: the config has no key 'step'; configs/base.py explains "
            'those it has. Did you mean "steps" instead of "step"?',
        ),
        (
            ["--config=configs/glyphs.py", "--config.trial.steps=4"],
            "error: --config.trial.steps: the config has no key 'trial'; ",
        ),
        (
            ["--config=configs/glyphs.py:SX"],
            "error: model.descriptors='SX' must be one or more of the letters S, M, G, R, C, each "
            "at most once, such as SG or GSM.",
        ),
        (
            ["--config=configs/nowhere.py"],
            "error: --config=configs/nowhere.py: there is no such config or file; there are base,",
        ),
        (
            ["--config", "configs/nowhere.py:SG", "--config.train.steps=4"],
            "error: --config=configs/nowhere.py: there is no such config or file; there are base,",
        ),
        (["--config=README.md"], "error: --config=README.md cannot be used: "),
        (
            ["--config=configs/glyphs.py", "--config.loss.ranking=triplet"],
            "error: loss.ranking='triplet' is unknown; valid names are batch_hard_",
        ),
        (
            ["--config=configs/glyphs.py", "--config.model.backbone=vit"],
            "error: model.backbone='vit' is unknown; valid names are resnet10, ",
        ),
        (
            ["--config=configs/glyphs.py", "--mode=tain"],
            "should be one of <train|eval|data|explain|export|study|index|search|pairs|serve>",
        ),
        (
            ["--config=configs/glyphs.py", "--config.train.steps=many"],
            "error: flag --config.train.steps=many: it must be a whole number.",
        ),
        (
            ["--config=configs/glyphs.py", "--config.train=many"],
            "error: flag --config.train=many: Failed to parse 'many' as a ConfigDict",
        ),
        (["--config=configs/glyphs.py", "eval"], "'eval' is one word too many; flags look like"),
        (["--mode=eval", "--workdir=/nowhere"], "error: There is no run in /nowhere"),
        (["--mode=export", "--workdir=/nowhere"], "error: There is no run in /nowhere"),
        (["--mode=explain", "--workdir=/nowhere"], "error: There is no run in /nowhere"),
        (
            ["--mode=explain", "--config=glyphs", "--query=b.png"],
            "error: --query and --match go togeth",
        ),
        (["--mode=eval", "--match=b.png"], "error: --match goes with `explain`, not with `eval`."),
        (
            ["--mode=explain", "--workdir=/nowhere", "--query=main.py", "--match=b.png"],
            "error: There is no run in /nowhere",
        ),
        (["--mode=eval", "--push_to_hub=a/b"], "error: --push_to_hub goes with `export`, not"),
        (["--coordinator=localhost:1"], "--coordinator, --num_processes and --process_id go"),
    ],
)
def test_mistakes_are_answered_in_one_line(arguments, message):
    status, output, errors = run_here(*arguments)
    assert status == 1 and output == ""
    assert message in errors and "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1


def test_what_a_training_prints(finished_run):
    _, folder, results = finished_run
    output = (folder / "output.txt").read_text(encoding="utf-8")
    for pattern in [
        r"split +classes +images",
        r"train +6 +24 +3 +4 +5 +0",
        r"devices +1 × cpu",
        r"descriptors SG, embedding 8",
        r"FLOPs per image +[\d.]+ k\n",
        r"step 12/12  loss \d\.\d{3}  ranking .* img/s  0:00 left\nstep 12/12  R@1 ",
        r"raw pixels( +\d+\.\d\d){5}",
        r"untrained network( +\d+\.\d\d){5}",
        rf"CGD SG, step {results['step']}( +\d+\.\d\d){{5}}",
        r"95 % interval of R@1, bootstrapped over classes: \d+\.\d\d to \d+\.\d\d",
        r"\d s in all\. Look at curves.png and retrievals.png in ",
    ]:
        assert re.search(pattern, output), f"{pattern} is not in:\n{output}"
    assert "Step 12 is the last one; no step was chosen on" in " ".join(output.split())


@pytest.fixture
def commands(finished_run, tmp_path):
    """The work folder of a finished run, and the flags that made it."""
    config, finished, _ = finished_run
    folder = shutil.copytree(finished, tmp_path / "run")
    data = f"--config.data.dir={config.data.dir}"
    return folder, ["--config=tests/tiny.py", data, f"--workdir={folder}"]


def test_the_same_command_again_trains_nothing_and_reports_the_same(finished_run, commands, drawn):
    _, _, results = finished_run
    folder, flags = commands
    before = (folder / "history.csv").read_text()
    (folder / "results.json").unlink()
    status, output, errors = run_here(*flags)
    assert status == 0 and errors == "", errors
    assert "Resumed from the checkpoint of step 12." in output and "step 12/12" not in output
    again = json.loads((folder / "results.json").read_text())
    again["costs"]["embed_seconds"] = results["costs"]["embed_seconds"]  # another time, as always
    assert again == results
    assert (folder / "history.csv").read_text() == before
    # What a run is looked at by.
    curves, retrievals = drawn
    losses, recalls, *_ = curves.axes
    rows = read_history(folder / "history.csv")
    lines = {line.get_label(): line.get_xydata().tolist() for line in losses.lines + recalls.lines}
    assert lines["classification"] == [[row["step"], row["classification_loss"]] for row in rows]
    assert lines["R@1"] == [
        [row["step"], 100 * row["recall@1"]] for row in rows if "recall@1" in row
    ]
    assert {"R@1, raw pixels", "R@1, untrained network"} < lines.keys()
    assert f"R@1 = {results['metrics']['recall@1']:.1%}\n" in retrievals.get_suptitle()
    (frames,) = retrievals.images
    pixels = set(map(tuple, frames.get_array().reshape(-1, 3).tolist()))
    assert {ImageColor.getrgb(color) for color in (plots.GREEN, plots.RED)} < pixels
    assert (folder / "curves.png").exists() and (folder / "retrievals.png").exists()


def test_commands_of_a_finished_run(finished_run, commands, drawn):
    _, _, results = finished_run
    folder, flags = commands
    status, output, errors = run_here("--mode=eval", *flags, "--config.eval.flip=True")
    assert status == 0, errors
    assert re.search(r"embedding, flip( +\d+\.\d\d){5}", output)
    assert f"{100 * results['metrics']['recall@1']:.2f}" in output
    status, output, errors = run_here("--mode=export", f"--workdir={folder}")
    assert status == 0, errors
    assert "its README.md says how to open it" in output
    assert cgd_jax.open(folder / "export").image_size == 8
    pair = ["--query=docs/glyphs_curves.png", "--match=docs/glyphs_retrievals.png"]
    status, output, errors = run_here("--mode=explain", *flags, *pair)
    assert status == 0, errors
    assert f"Look at {folder}/explain-glyphs_curves-glyphs_retrievals.png." in output
    assert (folder / "explain-glyphs_curves-glyphs_retrievals.png").exists()
    query, _, match, overlaid, shares, *_ = drawn[-1].axes
    assert drawn[-1].get_suptitle() == f"blobs, CGD SG, step {results['step']}"
    assert query.get_title() == "query\nglyphs_curves.png"
    assert match.get_title() == "match\nglyphs_retrievals.png"
    shown, heat = overlaid.images
    assert shown.get_array().std() > 0 and np.any(heat.get_array())
    assert [label.get_text() for label in shares.get_yticklabels()] == ["S", "G"]
    status, output, errors = run_here(*flags, "--config.train.steps=13")
    assert status == 1 and output == "" and "train.steps: 12 → 13" in errors
    assert errors.startswith("error: ") and "Traceback" not in errors


def test_data_mode(data, tmp_path):
    status, output, errors = run_here(
        "--mode=data",
        "--config=tests/tiny.py",
        f"--config.data.dir={data}",
        f"--workdir={tmp_path}/run",
    )
    assert status == 0, errors
    assert re.search(r"query +6 +24 +3 +4 +5 +0", output)
    # Twelve tiles of 64 pixels in a row, the three of a class side by side.
    drawn = Image.open(tmp_path / "run" / "samples.png").convert("RGB")
    sheet = np.asarray(drawn, float)[20:-4, 4:].mean(0)
    tiles = sheet.reshape(4, 3, 68, 3)[:, :, :64].mean(2)
    within = np.linalg.norm(tiles - tiles.mean(1, keepdims=True), axis=-1)
    between = np.linalg.norm(tiles.mean(1)[:, None] - tiles.mean(1), axis=-1)
    assert within.max() < between[between > 0].min()


@pytest.mark.slow
def test_kill_9_then_ctrl_c_and_the_same_command_again(data, tmp_path):
    flags = [
        "--config=tests/tiny.py",
        f"--config.data.dir={data}",
        f"--workdir={tmp_path}/run",
        "--config.train.steps=1000",
        "--config.train.eval_every=1000",
        "--config.train.checkpoint_every=100",
        "--config.train.log_every=10",
        "--config.eval.baselines=False",
    ]

    def start_and_wait_for(step):
        process = start(*flags)
        output = ""
        for line in process.stdout:
            output += line
            if (at := re.match(r"step +(\d+)/1000", line)) and int(at[1]) >= step:
                return process, output
        raise AssertionError(output)

    process, _ = start_and_wait_for(250)
    process.kill()
    process.communicate()
    process, output = start_and_wait_for(400)
    resumed = re.search(r"Resumed from the checkpoint of step (\d+)\.", output)
    assert int(resumed[1]) in (100, 200, 300), "the last one may not have been complete"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    stopped = re.search(r"Stopped at step (\d+) of 1000; the same command goes on", output)
    assert f"goes on from the checkpoint of step {stopped[1]} in" in output
    status, output, errors = run(*flags)
    assert status == 0, errors
    assert errors == "", "the output is no terminal: no bars, and no warnings of libraries"
    assert f"Resumed from the checkpoint of step {stopped[1]}." in output
    history = np.genfromtxt(tmp_path / "run" / "history.csv", delimiter=",", names=True)
    assert list(history["step"]) == list(range(10, 1001, 10))
