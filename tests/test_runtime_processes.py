"""Two real processes on one machine compute what one process computes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from cgd_jax import train
from cgd_jax.reports.history import read_history
from cgd_jax.reports.tables import write_csv
from cgd_jax.runtime import processes
from cgd_jax.runtime.errors import UserError

ROOT = Path(__file__).parents[1]


def start(*arguments):
    return subprocess.Popen(
        [
            *(sys.executable, "main.py", "--config=tests/tiny.py", "--config.train.steps=6"),
            *("--config.eval.baselines=False", "--config.eval.query_expansion=2", *arguments),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(tiny_config, tmp_path):
    tiny_config.train.steps = 6
    tiny_config.eval.update(baselines=False, query_expansion=2)
    train.train_and_evaluate(tiny_config, str(tmp_path / "alone"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pair = [
        start(
            f"--config.data.dir={tiny_config.data.dir}",
            f"--workdir={tmp_path}/together",
            f"--coordinator=localhost:{port}",
            "--num_processes=2",
            f"--process_id={i}",
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert "2 × cpu" in outputs[0][0]
    assert "R@1" not in outputs[1][0], "only the first process reports"
    histories = [read_history(tmp_path / w / "history.csv") for w in ("alone", "together")]
    assert len(histories[0]) == 3
    for ours, theirs in zip(*histories, strict=True):
        for name in ("loss", "ranking_loss", "classification_loss", "recall@1", "accuracy"):
            assert (name in ours) == (name in theirs)
            assert ours.get(name, 0) == pytest.approx(theirs.get(name, 0), rel=1e-5)
    # Each process has ranked, and searched for, its own queries.
    results = [
        json.loads((tmp_path / w / "results.json").read_text()) for w in ("alone", "together")
    ]
    for measure in (lambda r: r["metrics"], lambda r: r["with options"]["queries expanded by 2"]):
        ours, theirs = map(measure, results)
        assert ours["queries"] == theirs["queries"] == 24
        for name in ("recall@1", "map@r", "mrr"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_one_process_is_the_first_and_holds_everything():
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    assert processes.is_first() and processes.local_mesh(mesh) == mesh
    np.testing.assert_array_equal(processes.local_rows(split, 5), np.arange(5))
    vote = processes.stop_together(split)
    assert [vote(flag) for flag in (False, True, False)] == [False, True, False]
    x = jax.device_put(np.arange(4), split)
    np.testing.assert_array_equal(processes.to_host(x), np.arange(4))
    processes.wait_for_all("nowhere")


def test_a_process_that_goes_on_knows_what_was_measured(tmp_path, monkeypatch):
    write_csv(tmp_path / "history.csv", [{"step": 2, "recall@1": 0.5}])
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    scratch = processes.report_folder(tmp_path)
    assert scratch != tmp_path
    assert read_history(scratch / "history.csv") == [{"step": 2, "recall@1": 0.5}]
    assert read_history(processes.report_folder(tmp_path / "new") / "history.csv") == []


def test_several_processes_hear_of_a_vote_a_round_later(monkeypatch):
    """So that all of them leave at the same step, and no device waits for the answer."""
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    vote = processes.stop_together(split)
    assert [vote(flag) for flag in (False, True, False, False)] == [False, False, True, False]


def test_rows_are_shared_by_the_processes_of_a_mesh():
    devices = [SimpleNamespace(process_index=i) for i in (0, 1, 2, 2)]
    mesh = SimpleNamespace(devices=np.array(devices))
    assert processes.share_of_rows(mesh, 3) == slice(0, None, 3)
    assert processes.share_of_rows(mesh, 2) == slice(None), "nobody is left without a row"
    mesh = SimpleNamespace(devices=np.array(devices[:1]))
    assert np.arange(5)[processes.share_of_rows(mesh, 5)].tolist() == [0, 1, 2, 3, 4]


def test_processes_that_do_not_find_each_other(monkeypatch):
    def fail(*args):
        raise RuntimeError("deadline\nexceeded")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match="deadline exceeded.*--coordinator=HOST:PORT"):
        processes.start("nowhere:1", 2, 0)
