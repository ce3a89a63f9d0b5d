"""W&B and MLflow: what they are given, new runs and resumed ones, and what they refuse."""

import contextlib
import logging
import sys
import types

import pytest

from cgd_jax import rules
from cgd_jax.reports import trackers
from cgd_jax.reports.history import History
from cgd_jax.runtime.errors import ConfigError

CONFIG = {"seed": 3, "train": {"steps": 12}}
ROWS = {2: {"loss": 0.5}, 4: {"loss": 0.25, "recall@1": 0.75}}


def add_rows(name, folder, rows):
    folder.mkdir(exist_ok=True)
    with trackers.tracking(name, folder, CONFIG) as track, History(folder, 0, track) as history:
        for step, values in rows.items():
            history.add(step, values)


class FakeWandb:
    """Remembers runs by their identity, as the server does."""

    def __init__(self):
        self.runs, self.opened = {}, []

    def Settings(self, **settings):
        return settings

    def init(self, *, project, name, id, resume, config, dir, settings):
        self.opened.append((project, name, config))
        return FakeRun(id or f"run{len(self.runs)}", self.runs)


class FakeRun:
    """Takes no row before the last one, as W&B does."""

    def __init__(self, id, runs):
        self.id, self.rows = id, runs.setdefault(id, {})

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.ended = True

    def log(self, values, step):
        if step >= max(self.rows, default=0):
            self.rows.setdefault(step, {}).update(values)


def test_wandb(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    add_rows("wandb", tmp_path / "glyphs", ROWS)
    assert fake.opened == [("cgd_jax", "glyphs", CONFIG)] and fake.runs == {"run0": ROWS}
    # Resumed from a checkpoint before the last row: it goes on with the same run.
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    add_rows("wandb", tmp_path / "glyphs", {2: {"loss": 9.0}, 6: {"loss": 0.125}})
    assert fake.runs == {"run0": ROWS | {6: {"loss": 0.125}}} and fake.opened[1][0] == "mine"
    add_rows("wandb", tmp_path / "other", ROWS)
    assert fake.runs["run1"] == ROWS


class FakeMlflow(types.SimpleNamespace):
    """Remembers runs, and refuses the names that MLflow refuses."""

    def __init__(self):
        super().__init__(runs={}, params={}, experiments=[])
        self.set_experiment = self.experiments.append
        self.get_tracking_uri = lambda: "file:mlruns"

    def start_run(self, run_id, run_name):
        self.active = run_id or f"run{len(self.runs)}"
        self.runs.setdefault(self.active, {})
        run = contextlib.nullcontext()
        run.info = types.SimpleNamespace(run_id=self.active)
        return run

    def log_params(self, params):
        assert self.active not in self.params
        self.params[self.active] = params

    def log_metrics(self, values, step):
        assert not any("@" in name for name in values)
        self.runs[self.active][step] = values


def test_mlflow(tmp_path, monkeypatch):
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    add_rows("mlflow", tmp_path / "glyphs", ROWS)
    assert fake.params == {"run0": {"seed": 3, "train.steps": 12}}
    expected = {2: {"loss": 0.5}, 4: {"loss": 0.25, "recall_at_1": 0.75}}
    assert fake.runs == {"run0": expected} and fake.experiments == ["cgd_jax"]
    add_rows("mlflow", tmp_path / "glyphs", {6: {"loss": 0.125}})
    assert fake.runs == {"run0": expected | {6: {"loss": 0.125}}}


def test_what_a_tracker_does_not_take(tmp_path, monkeypatch, caplog):
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)

    def refuse(*arguments, **named):
        raise RuntimeError("no route\nto the server")

    fake.log_metrics = refuse
    with caplog.at_level(logging.WARNING):
        add_rows("mlflow", tmp_path / "run", ROWS)
    assert "mlflow did not take the row of step 4: no route\nto the server" in caplog.text
    assert "4,0.25,0.75" in (tmp_path / "run/history.csv").read_text()
    fake.set_experiment = refuse
    with pytest.raises(ConfigError, match="train.tracker='mlflow' does not take the run: no route"):
        add_rows("mlflow", tmp_path / "run", ROWS)


def test_a_tracker_that_is_not_installed_or_not_known(tiny_config, monkeypatch):
    for name in trackers.TRACKERS:
        monkeypatch.setitem(sys.modules, name, None)
        tiny_config.train.tracker = name
        with pytest.raises(ConfigError, match=f"train.tracker={name} needs {name}: pip install"):
            rules.validate(tiny_config)
    tiny_config.train.tracker = "tensorboard"
    with pytest.raises(
        ConfigError,
        match="train.tracker='tensorboard' is unknown; valid names are wandb, mlflow, or empty",
    ):
        rules.validate(tiny_config)
