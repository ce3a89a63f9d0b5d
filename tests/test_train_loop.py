"""The training loop by itself: when it stops, and what it evaluates, logs and saves when."""

import functools
import json
import math
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cgd_jax import checkpoint, run, train, train_step
from cgd_jax.data import Dataset, Split
from cgd_jax.evaluation import evaluate
from cgd_jax.preprocess import IMAGENET
from cgd_jax.reports.history import History
from cgd_jax.reports.throughput import Meter
from cgd_jax.sharding import shardings
from tests import quick
from tests.test_train import history_without_speed
from tests.variables import assert_same


@pytest.fixture
def fit_line(tiny_config, monkeypatch):
    """The training loop on a line from brightness to label, in the place of a network.

    fit_line(folder, bad, interrupt, validation) trains it from the latest checkpoint on and returns
    its state and whether it was stopped. The loss of the steps in `bad` is not finite; `interrupt`
    is called with "training" or "evaluation" and the number of the step whenever one begins;
    `validation` says whether there are validation classes.
    """
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8)
    labels = np.repeat(np.arange(6, dtype=np.int32), 4)
    split = Split(images, labels, [f"{label}-{i}" for i, label in enumerate(labels)], {})
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    replicated, batch_sharding = shardings(mesh)
    optimizer = optax.adam(0.1)

    def line(params, images):
        return params["slope"] * images.mean((1, 2, 3)) / 255 + params["offset"]

    def fit(folder, bad=(), interrupt=lambda where, step: None, validation=False):
        @functools.partial(jax.jit, donate_argnums=0)
        def fit_once(state, images, labels):
            def loss_of(params):
                return jnp.mean((line(params, images) - labels) ** 2)

            loss, gradients = jax.value_and_grad(loss_of)(state.params)
            loss = jnp.where(jnp.isin(state.step + 1, jnp.array(bad, int)), jnp.nan, loss)
            state = train_step.update(tiny_config, optimizer, state, gradients, {}, loss)
            return state, {"loss": loss, "skipped": state.skipped}

        def step_once(state, images, labels):
            interrupt("training", int(state.step) + 1)
            return fit_once(state, images, labels)

        def embed_function(run, state):
            interrupt("evaluation", int(state.step))
            return lambda images: jnp.stack([line(state.params, images), jnp.ones(len(images))], 1)

        monkeypatch.setattr(train_step, "make_train_step", lambda *_: step_once)
        monkeypatch.setattr(evaluate, "embed_function", embed_function)
        params = {"slope": jnp.float32(0), "offset": jnp.float32(0)}
        drawn = train_step.State(
            step=jnp.int32(0),
            params=params,
            batch_stats={},
            opt_state=optimizer.init(params),
            normalization=jax.tree.map(jnp.asarray, IMAGENET),
            average=None,
            skipped=jnp.int32(0),
        )
        drawn, dataset = jax.device_put(drawn, replicated), Dataset(split, split, None)
        folder.mkdir(exist_ok=True)
        begun = run.Run(
            config=tiny_config,
            workdir=str(folder),
            folder=folder,
            dataset=dataset,
            validation=dataset if validation else None,
            labels=labels,
            model=None,
            optimizer=optimizer,
            batch_sharding=batch_sharding,
        )
        with checkpoint.manager(folder, tiny_config.train.keep) as checkpoints:
            state = checkpoint.restore_latest(checkpoints, drawn) or drawn
            with History(folder, int(state.step)) as history:
                meter = Meter(12, math.nan, math.nan, time.time())
                return train.train(begun, state, checkpoints, meter, history)

    return fit


def steps_saved(folder):
    """The steps of the checkpoints, with whether each was evaluated."""
    with checkpoint.manager(folder) as checkpoints:
        steps = sorted(checkpoints.all_steps())
        return {step: checkpoints.metrics(step) is not None for step in steps}


@pytest.mark.parametrize(
    "during,number",
    quick.first(
        [("evaluation", signal.SIGTERM), ("training", signal.SIGINT), ("training", signal.SIGHUP)]
    ),
)
def test_a_run_that_is_stopped_at_every_step_ends_as_if_it_had_not_been(
    tiny_config, fit_line, tmp_path, during, number
):
    """Whether a checkpoint is due at the step, or an evaluation, or nothing."""
    tiny_config.train.update(steps=6, log_every=1, eval_every=3, checkpoint_every=4)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    expected, stopped = fit_line(whole)
    assert not stopped
    for stop in range(1, 7):

        def interrupt(where, step, stop=stop):
            if step == stop and where == (during if stop % 3 == 0 else "training"):
                signal.raise_signal(number)
                assert where == "training", "a long evaluation is dropped at once"

        state, stopped = fit_line(parts, interrupt=interrupt)
        assert stopped and state.step == stop == max(steps_saved(parts))
        assert not steps_saved(parts)[stop], "the evaluation is repeated"
        assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    state, stopped = fit_line(parts)
    assert not stopped
    assert_same(state, expected)
    assert history_without_speed(parts) == history_without_speed(whole)
    assert [row["step"] for row in history_without_speed(parts)] == list(range(1, 7))
    assert steps_saved(parts)[6] and steps_saved(whole)[6]


def test_when_it_is_logged_evaluated_and_saved(tiny_config, fit_line, tmp_path):
    tiny_config.train.update(steps=10, eval_every=20, checkpoint_every=20, log_every=1)
    state, _ = fit_line(tmp_path / "often")
    losses = [row["loss"] for row in history_without_speed(tmp_path / "often")]
    assert len(losses) == 10 and losses[-1] < losses[0]
    assert steps_saved(tmp_path / "often") == {10: True}, "the last step, whatever is due"
    tiny_config.train.update(log_every=4, eval_every=6, checkpoint_every=5, keep=9)
    other, _ = fit_line(tmp_path / "seldom")
    assert_same(other, state)
    rows = {row["step"]: row for row in history_without_speed(tmp_path / "seldom")}
    assert list(rows) == [4, 6, 8, 10]
    means = {4: losses[:4], 8: losses[4:8], 10: losses[8:]}
    for step, of in means.items():
        assert rows[step]["loss"] == pytest.approx(np.mean(of), rel=1e-5)
    assert [step for step in rows if "recall@1" in rows[step]] == [6, 10]
    assert "loss" not in rows[6]
    assert steps_saved(tmp_path / "seldom") == {5: False, 6: True, 10: True}


@pytest.mark.parametrize(
    "bad,skip,log_every,stops,saved",
    [
        ((6, 9), 0, 2, 6, 4),
        # Nothing is logged at it; else the next start would pass over it.
        ((8,), 0, 5, 8, 6),
        ((5, 8, 9), 1, 2, 9, 8),  # one at a time may be passed over
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run(
    tiny_config, fit_line, tmp_path, bad, skip, log_every, stops, saved
):
    tiny_config.train.update(skip_nonfinite=skip, log_every=log_every)
    for _ in range(2):
        with pytest.raises(train.Diverged, match=f"not finite at step {stops}.*nonfinite.json"):
            fit_line(tmp_path, bad)
        found = json.loads((tmp_path / "nonfinite.json").read_text())
        assert found["step"] == stops and found["metrics"]["loss"] == "nan"
        assert len(found["images"]) == 12 and found["images"][0].count("-") == 1
        assert max(steps_saved(tmp_path)) == saved


def test_steps_that_are_not_finite_may_be_passed_over(tiny_config, fit_line, tmp_path):
    tiny_config.train.skip_nonfinite = 1
    state, _ = fit_line(tmp_path, (5, 8))
    assert state.step == 12 and state.skipped == 0
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(state))
    assert all(np.isfinite(row.get("loss", 0)) for row in history_without_speed(tmp_path))


def test_a_profile_of_some_steps(tiny_config, fit_line, tmp_path):
    tiny_config.profile_steps = "3:5"
    fit_line(tmp_path)
    assert list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))
    train.profile("3:5", first=3, step=5, folder=tmp_path, metrics=None)  # resumed within it


@pytest.fixture
def scripted(monkeypatch):
    """What evaluations find: R@1 by step."""
    recalls = {2: 0.2, 4: 0.9, 6: 0.5, 8: 0.4}

    def evaluate_step(run, state, stopped_by):
        return {"recall@1": recalls[int(state.step)]}

    monkeypatch.setattr(train, "evaluate_step", evaluate_step)


@pytest.mark.parametrize(
    "validation,best_of_test,chosen", [(True, False, 4), (False, True, 4), (False, False, 8)]
)
def test_which_step_is_chosen(
    tiny_config, fit_line, tmp_path, scripted, validation, best_of_test, chosen
):
    """The best one only where that is no choice on the test classes, or is asked for."""
    tiny_config.train.update(steps=8, eval_every=2, best_of_test=best_of_test)
    fit_line(tmp_path, validation=validation)
    with checkpoint.manager(tmp_path) as checkpoints:
        assert checkpoints.best_step() == chosen


def test_patience_ends_a_run_which_then_trains_no_further(
    tiny_config, fit_line, tmp_path, scripted
):
    tiny_config.train.update(eval_every=2, patience=2)
    for _ in range(2):
        state, stopped = fit_line(tmp_path, validation=True)
        assert state.step == 8 and not stopped
