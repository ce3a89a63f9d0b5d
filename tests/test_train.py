"""Training: schedules, optimizers, losses put together, and runs that stop and go on."""

import json
import os
import resource
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from cgd_jax import (
    checkpoint,
    evaluate,
    experiment,
    losses,
    outcome,
    report,
    survival,
    train,
    train_step,
)
from cgd_jax.augment import EFFICIENTNET_LITE, IMAGENET
from cgd_jax.config import ConfigError, to_dict
from cgd_jax.models import pretrained
from cgd_jax.optimizer import learning_rate_schedule, make_optimizer, moving_average
from configs import base


def schedule_of(steps=100, **values):
    config = base.get_config().optimizer
    config.update(values)
    return learning_rate_schedule(config, steps)


def test_step_schedule():
    schedule = schedule_of(learning_rate=1e-4, decay_at=(0.4, 0.8), warmup_steps=10)
    rates = [float(schedule(step)) for step in range(100)]
    np.testing.assert_allclose(rates[:10], 1e-5 * np.arange(10), rtol=1e-5)
    np.testing.assert_allclose(rates[10:40], 1e-4, rtol=1e-5)
    np.testing.assert_allclose(rates[40:80], 1e-5, rtol=1e-5)
    np.testing.assert_allclose(rates[80:], 1e-6, rtol=1e-5)


def test_cosine_and_constant_schedules():
    schedule = schedule_of(schedule="cosine", learning_rate=1.0, warmup_steps=20)
    np.testing.assert_allclose(schedule(10), 0.5)
    np.testing.assert_allclose(schedule(20), 1.0)
    np.testing.assert_allclose(schedule(60), 0.5, atol=1e-6)
    np.testing.assert_allclose(schedule(100), 0.0, atol=1e-6)
    assert {float(schedule_of(schedule="constant", learning_rate=2.0)(s)) for s in (0, 99)} == {2.0}


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_first_updates_by_hand(name):
    config = base.get_config().optimizer
    config.update(name=name, schedule="constant", learning_rate=0.1)
    config.weight_decay = 0.0 if name == "adam" else 0.5
    optimizer = make_optimizer(config, 10)
    params = {"fc": jnp.array([[2.0, -4.0]])}
    gradient = {"fc": jnp.array([[0.3, 0.3]])}
    state = optimizer.init(params)
    updates, state = optimizer.update(gradient, state, params)
    decay = 0.1 * 0.5 * params["fc"]
    if name == "sgd":
        np.testing.assert_allclose(updates["fc"], -0.1 * gradient["fc"] - decay, rtol=1e-5)
        updates, _ = optimizer.update(gradient, state, params)
        np.testing.assert_allclose(updates["fc"], -0.1 * 1.9 * gradient["fc"] - decay, rtol=1e-5)
    else:  # Adam's first step has the length of the learning rate
        expected = -0.1 - (decay if name == "adamw" else 0.0)
        np.testing.assert_allclose(updates["fc"], expected * jnp.ones((1, 2)), rtol=1e-4)


def test_learning_rates_of_backbone_and_new_layers():
    config = base.get_config().optimizer
    config.update(schedule="constant", learning_rate=0.1, backbone_rate=0.25)
    config.freeze_backbone_steps = 2
    optimizer = make_optimizer(config, 10)
    params = {"backbone": {"kernel": jnp.ones((1, 1))}, "fc_S": jnp.ones((1, 1))}
    state = optimizer.init(params)
    for step in range(4):  # of a constant gradient, Adam's steps have the learning rate's length
        updates, state = optimizer.update(params, state, params)
        np.testing.assert_allclose(updates["fc_S"], -0.1, rtol=1e-4)
        expected = 0.0 if step < 2 else -0.025
        np.testing.assert_allclose(updates["backbone"]["kernel"], expected, rtol=1e-4)


def test_weight_decay_spares_norms_and_biases():
    config = base.get_config().optimizer
    config.update(name="adamw", weight_decay=0.5, schedule="constant", learning_rate=0.1)
    optimizer = make_optimizer(config, 10)
    params = {
        "backbone": {"bn1": {"scale": jnp.ones(2)}, "conv1": {"kernel": jnp.ones((1, 1, 2, 2))}},
        "gem_p_learned": jnp.ones(()),
        "auxiliary_fc": {"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))},
    }
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    changed = {path[-1].key for path, u in jax.tree_util.tree_leaves_with_path(updates) if u.any()}
    assert changed == {"kernel"}
    np.testing.assert_allclose(updates["auxiliary_fc"]["kernel"], -0.05, rtol=1e-6)


def test_moving_average_by_hand():
    average, params = {"w": jnp.zeros(2)}, {"w": jnp.array([1.0, 2.0])}
    found = moving_average(average, params, jnp.int32(0), 0.9)  # 0.1 of the old
    np.testing.assert_allclose(found["w"], [0.9, 1.8], rtol=1e-6)
    found = moving_average(average, params, jnp.int32(1000), 0.9)
    np.testing.assert_allclose(found["w"], [0.1, 0.2], rtol=1e-6)


def test_total_loss_is_the_weighted_sum_and_a_weight_of_zero_switches_off():
    config = base.get_config().loss
    rng = np.random.default_rng(0)
    vectors = [jnp.asarray(rng.normal(size=(6, 4)), jnp.float32) for _ in range(2)]
    logits = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)
    labels = jnp.array([0, 0, 1, 1, 2, 2])
    config.update(ranking_weight=2.0, classification_weight=3.0)
    config.batch_hard_triplet.margin = 0.7
    config.temperature = 0.2
    total, ranking, classification = train_step.compute_losses(config, vectors, logits, labels)
    # Rival A: the mean of the losses of its branches.
    expected = np.mean([losses.batch_hard_triplet_loss(v, labels, 0.7) for v in vectors])
    np.testing.assert_allclose(ranking, expected, rtol=1e-6)
    expected = losses.smoothed_cross_entropy(logits, labels, temperature=0.2)
    np.testing.assert_allclose(classification, expected)
    np.testing.assert_allclose(total, 2 * ranking + 3 * classification, rtol=1e-6)
    config.classification_weight = 0.0
    nan = jnp.full((6, 3), jnp.nan)
    total, _, classification = train_step.compute_losses(config, vectors, nan, labels)
    assert classification == 0 and total == 2 * ranking
    config.update(ranking_weight=0.0, classification_weight=1.0)
    total, ranking, _ = train_step.compute_losses(config, [vectors[0] * jnp.nan], logits, labels)
    assert ranking == 0 and np.isfinite(total)


@pytest.mark.parametrize("name", losses.RANKING_LOSSES)
def test_every_ranking_loss_takes_the_options_of_the_config(name):
    config = base.get_config().loss
    config.ranking = name
    vectors = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    labels = jnp.array([0, 0, 1, 1, 2, 2])
    vectors *= 0.1  # close together: every loss is at work
    before = train_step.compute_losses(config, [vectors], jnp.zeros((6, 3)), labels)[1]
    for option in config[name]:
        changed = ConfigDict(config)
        changed[name][option] = 1.7 * config[name][option]
        after = train_step.compute_losses(changed, [vectors], jnp.zeros((6, 3)), labels)[1]
        if option != "mining_margin":  # may mine the same pairs
            assert before != after, f"{name}.{option} does nothing"


def state_of(config, workdir):
    """The state of the latest checkpoint."""
    setup = experiment.set_up(config)
    with checkpoint.manager(workdir) as checkpoints:
        return checkpoint.restore(checkpoints, setup.state, checkpoints.latest_step())


def assert_same(state, other):
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(other), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs, err_msg=jax.tree_util.keystr(path))


def interrupt_at(monkeypatch, step, number=signal.SIGINT):
    """A signal arrives while the row of a step is written."""
    add = report.History.add

    def add_and_interrupt(self, at, values):
        add(self, at, values)
        if at == step:
            signal.raise_signal(number)

    monkeypatch.setattr(report.History, "add", add_and_interrupt)


def interrupted(number, *args, **options):
    """Takes the place of a long evaluation that a signal comes into."""
    signal.raise_signal(number)
    raise AssertionError("it went on")


def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(
    tiny_config, tmp_path, monkeypatch, capsys
):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    results = train.train_and_evaluate(tiny_config, whole)
    # Not steps at which a checkpoint is due; and while the steps 6 and 12 are evaluated.
    for step, number in [
        (2, signal.SIGTERM),
        (6, signal.SIGTERM),
        (10, signal.SIGINT),
        (12, signal.SIGINT),
    ]:
        with monkeypatch.context() as patch:
            if step % 6:
                interrupt_at(patch, step, number)
            else:
                patch.setattr(evaluate, "recall", partial(interrupted, number))
            with pytest.raises(SystemExit) as stop:
                train.train_and_evaluate(tiny_config, parts)
        assert stop.value.code == survival.REQUEUE == 75
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        output = capsys.readouterr().out
        assert f"Stopped at step {step} of 12; the same command goes on from " in output
        assert f"from the checkpoint of step {step} in {parts}" in output
        assert state_of(tiny_config, parts).step == step
    resumed = train.train_and_evaluate(tiny_config, parts)
    assert "Resumed from the checkpoint of step 12" in capsys.readouterr().out
    assert resumed == results
    assert_same(state_of(tiny_config, whole), state_of(tiny_config, parts))
    histories = [report.read_history(Path(w, "history.csv")) for w in (whole, parts)]
    assert [row["step"] for row in histories[1]] == [2, 4, 6, 8, 10, 12]
    for ours, theirs in zip(*histories, strict=True):
        assert "input_wait" in ours and "tflops_per_second" in ours
        for name in ("images_per_second", "input_wait", "tflops_per_second"):
            del ours[name], theirs[name]
        assert ours == theirs


def test_a_run_leaves_what_the_readme_promises(tiny_config, tmp_path):
    workdir = tmp_path / "run"
    results = train.train_and_evaluate(tiny_config, str(workdir))
    for name in (
        "config.json",
        "history.csv",
        "curves.png",
        "retrievals.png",
        "results.json",
        "per_class.csv",
    ):
        assert (workdir / name).stat().st_size > 0
    assert list(workdir.glob("tensorboard/events*")) and not list(workdir.glob("*.tmp"))
    assert json.loads((workdir / "results.json").read_text()) == results
    assert set(results["baselines"]) == {"raw pixels", "untrained network"}
    history = report.read_history(workdir / "history.csv")
    best = max((row for row in history if "recall@1" in row), key=lambda r: r["recall@1"])
    assert results["metrics"]["recall@1"] == pytest.approx(best["recall@1"], abs=1e-5)
    # Colours are easy: it has learned something, and rows are plausible.
    assert history[-1]["classification_loss"] < history[0]["classification_loss"]
    assert results["metrics"]["recall@1"] > 0.3
    # Evaluation by itself gives what training logged, for the best and for any step kept.
    assert outcome.evaluate_run(str(workdir))["metrics"] == results["metrics"]
    last = outcome.evaluate_run(str(workdir), 12)
    assert last["metrics"]["recall@1"] == pytest.approx(history[-1]["recall@1"], abs=1e-5)
    assert (workdir / "eval-12.json").exists() and (workdir / "retrievals-12.png").exists()
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 5; the steps kept are: "):
        outcome.evaluate_run(str(workdir), 5)
    # The same command again: nothing is trained, the same is reported.
    assert train.train_and_evaluate(tiny_config, str(workdir)) == results


def test_inference_options_are_measured_beside_the_plain_embedding(tiny_config, tmp_path, capsys):
    tiny_config.eval.baselines = False
    tiny_config.train.steps = 2
    plain = train.train_and_evaluate(tiny_config, str(tmp_path))
    assert plain["with options"] == {}
    tiny_config.eval.update(
        vector="descriptor_S",
        flip=True,
        scales=(1.0, 1.5),
        whitening_dim=3,
        database_augmentation=1,
        query_expansion=2,
        rerank=True,
        clustering=True,
        save_embeddings=True,
        center_crop=True,
        projection="pca",
        projector=True,
        complementarity=True,
    )
    result = outcome.evaluate_run(str(tmp_path), config=tiny_config)
    assert list(result["with options"]) == [
        "descriptor_S, flip, scales 1 1.5",
        "whitened to 3, database augmented by 1, queries expanded by 2",
        "re-ranked",
    ]
    for values in result["with options"].values():
        assert 0 <= values["recall@1"] <= 1
    assert result["metrics"]["recall@1"] == plain["metrics"]["recall@1"]
    assert 0 <= result["metrics"]["nmi"] <= 1
    found = result["complementarity"]
    assert found["queries"] == 24 and list(found["branches"]) == ["S", "G"]
    assert found["combined"] == plain["metrics"]["recall@1"]
    assert found == json.loads((tmp_path / "eval-2.json").read_text())["complementarity"]
    assert "| S, G " in (tmp_path / "complementarity-2.md").read_text()
    assert "right alone" in capsys.readouterr().out
    assert (tmp_path / "embeddings-2.png").stat().st_size > 0
    projector = tmp_path / "tensorboard/projector"
    assert np.loadtxt(projector / "vectors.tsv").shape == (24, 8)
    assert (projector / "metadata.tsv").read_text().splitlines()[1] == "colour 6\t6\t6-0\tquery"
    assert not list(tmp_path.rglob("*.tmp"))
    saved = np.load(tmp_path / "embeddings.npz")
    assert saved["query"].shape == (24, 16)
    np.testing.assert_allclose(np.linalg.norm(saved["query"], axis=1), 1, atol=1e-5)
    assert list(saved["query_ids"][:2]) == ["6-0", "6-1"] and saved["query_labels"][0] == 6
    tiny_config.eval.whitening_dim = 17
    with pytest.raises(ConfigError, match="eval: dim must be"):
        outcome.evaluate_run(str(tmp_path), config=tiny_config)
    tiny_config.model.embedding_dim = 16
    with pytest.raises(ConfigError, match="model.embedding_dim: 8 → 16"):
        outcome.evaluate_run(str(tmp_path), config=tiny_config)


def test_the_seed_decides_weights_batches_and_augmentation(tiny_config):
    kernels, batches, keys = [], [], []
    for seed in (0, 0, 1):
        tiny_config.seed = seed
        setup = experiment.set_up(tiny_config)
        kernels.append(np.asarray(setup.state.params["backbone"]["conv1"]["kernel"]))
        batches.append(experiment.batch_positions(tiny_config, setup.labels)(3))
        keys.append(jax.random.key_data(train_step.step_key(seed, 3)))
    for first, again, other in (kernels, batches, keys):
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)


def test_a_work_folder_of_another_config_is_refused(tiny_config, tmp_path):
    experiment.check_workdir(tiny_config, str(tmp_path))  # nothing there yet
    report.write_json(tmp_path / "config.json", to_dict(tiny_config))
    tiny_config.train.log_every = 1  # free to change
    experiment.check_workdir(tiny_config, str(tmp_path))
    tiny_config.optimizer.learning_rate = 0.5
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate: 0.004 → 0.5"):
        experiment.check_workdir(tiny_config, str(tmp_path))


def test_a_second_run_in_the_same_folder_is_refused(tiny_config, tmp_path):
    workdir = str(tmp_path / "run")
    with (
        survival.only_run_in(workdir),
        pytest.raises(
            BlockingIOError, match=rf"still at work \(process {os.getpid()} on .*--workdir"
        ),
    ):
        train.train_and_evaluate(tiny_config, workdir)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    with survival.only_run_in(workdir):  # it is free again
        pass


def test_a_run_that_cannot_begin_leaves_no_folder(tiny_config, tmp_path):
    tiny_config.train.classes_per_batch = 7
    with pytest.raises(ConfigError):
        train.train_and_evaluate(tiny_config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_pretrained_weights_fill_the_backbone(tiny_config, tmp_path):
    setup = experiment.set_up(tiny_config)
    variables = {"params": setup.state.params, "batch_stats": setup.state.batch_stats}
    doubled = jax.tree.map(lambda a: 2 * np.asarray(a) + 1, variables)
    path = tmp_path / "weights.safetensors"
    pretrained.save(path, doubled, EFFICIENTNET_LITE)
    state = experiment.load_pretrained(str(path), setup.state)
    kernel = state.params["backbone"]["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel, doubled["params"]["backbone"]["conv1"]["kernel"])
    assert kernel.sharding == setup.state.params["backbone"]["conv1"]["kernel"].sharding
    # Whatever was normalized otherwise before.
    np.testing.assert_array_equal(setup.state.normalization.mean, IMAGENET.mean)
    np.testing.assert_array_equal(state.normalization.mean, EFFICIENTNET_LITE.mean)
    np.testing.assert_array_equal(state.normalization.std, EFFICIENTNET_LITE.std)
    tiny_config.model.pretrained = str(tmp_path / "nowhere.safetensors")
    with pytest.raises(ConfigError, match="model.pretrained: .*nowhere.safetensors"):
        train.train_and_evaluate(tiny_config, str(tmp_path / "run"))


def test_too_many_classes_for_the_data_set(tiny_config):
    tiny_config.train.classes_per_batch = 7
    with pytest.raises(ConfigError, match="blobs has 6 training classes"):
        experiment.set_up(tiny_config)


def test_evaluating_a_folder_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config.json.*--workdir="):
        outcome.evaluate_run(str(tmp_path))


def state_with(step, weights):
    normalization = jax.tree.map(jnp.asarray, IMAGENET)
    return train_step.State(
        step=jnp.int32(step),
        params={"w": weights},
        batch_stats={},
        opt_state=optax.EmptyState(),
        normalization=normalization,
        average=None,
        skipped=jnp.int32(0),
    )


def test_checkpoints_keep_the_latest_and_the_best(tmp_path):
    def state(step):
        return state_with(step, jnp.full(3, float(step)))

    with checkpoint.manager(str(tmp_path), keep=2) as checkpoints:
        for step, recall in [(1, 0.2), (2, 0.9), (3, None), (4, 0.5), (5, None), (6, 0.1)]:
            checkpoint.save(checkpoints, state(step), recall)
    with checkpoint.manager(str(tmp_path)) as checkpoints:
        assert sorted(checkpoints.all_steps()) == [2, 5, 6]
        assert checkpoints.best_step() == 2 and checkpoints.latest_step() == 6
        np.testing.assert_array_equal(checkpoint.restore(checkpoints, state(0), 2).params["w"], 2)


def test_a_save_is_not_changed_by_the_steps_behind_it(tmp_path):
    """The buffers of a state are handed on to the next one while it is written."""
    donate = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
    state = state_with(0, jnp.zeros(1_000_000))
    with checkpoint.manager(str(tmp_path), keep=9) as checkpoints:
        for _ in range(4):
            state = donate(state)
            checkpoint.save(checkpoints, state)
            state = donate(donate(state))
        for step in checkpoints.all_steps():
            saved = checkpoint.restore(checkpoints, state, step)
            assert np.all(np.asarray(saved.params["w"]) == step)


def test_an_averaged_run_evaluates_its_average(tiny_config, tmp_path):
    tiny_config.optimizer.average = 0.5
    tiny_config.eval.baselines = False
    tiny_config.train.steps = 6
    result = train.train_and_evaluate(tiny_config, str(tmp_path))
    average, _, step = pretrained.read_run(tmp_path)
    assert step == result["step"] == 6
    state = state_of(tiny_config, str(tmp_path))
    assert_same(state.average, average["params"])
    assert state.variables()["params"] is state.average
    gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, state.average)
    assert max(jax.tree.leaves(gap)) > 1e-4
    setup = experiment.set_up(tiny_config)
    embeddings = outcome.embed_test(tiny_config, setup, state.replace(params=None))
    recall = evaluate.recall(embeddings, setup.dataset, (1,))["recall@1"]
    assert recall == pytest.approx(result["metrics"]["recall@1"])


def damage(folder, how):
    """Spoils a checkpoint in one of the ways that crashes and disks do."""
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if how == "file removed":
        files[-1].unlink()
    elif how == "truncated":
        files[-1].write_bytes(files[-1].read_bytes()[: files[-1].stat().st_size // 2])
    elif how == "zeroed":
        files[-1].write_bytes(bytes(files[-1].stat().st_size))
    elif how == "half renamed":
        (folder / "default").rename(folder / "default.orbax-checkpoint-tmp-1")
    elif how == "emptied":
        shutil.rmtree(folder)
        folder.mkdir()


@pytest.mark.parametrize("how", ["file removed", "truncated", "zeroed", "half renamed", "emptied"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, caplog, how):
    rng = np.random.default_rng(0)
    saved = {step: state_with(step, jnp.asarray(rng.normal(size=5000))) for step in (3, 7)}
    with checkpoint.manager(str(tmp_path), keep=5) as checkpoints:
        for step, state in saved.items():
            checkpoint.save(checkpoints, state, step / 10)
    damage(tmp_path / "checkpoints/7", how)
    with caplog.at_level("WARNING"), checkpoint.manager(str(tmp_path), keep=5) as checkpoints:
        found = checkpoint.restore_latest(checkpoints, state_with(0, jnp.zeros(5000)))
        assert_same(found, saved[3])
        # The run goes on, and writes step 7 once more.
        checkpoint.save(checkpoints, saved[7], 0.7)
    assert "Checkpoint 7 is damaged and was moved to" in caplog.text
    assert list(tmp_path.glob("damaged/7-*"))
    with checkpoint.manager(str(tmp_path), keep=5) as checkpoints:
        assert_same(checkpoint.restore_latest(checkpoints, saved[3]), saved[7])


def test_checkpoints_of_which_none_can_be_read_are_left_alone(tmp_path):
    with checkpoint.manager(str(tmp_path), keep=5) as checkpoints:
        for step in (3, 7):
            checkpoint.save(checkpoints, state_with(step, jnp.zeros(5000)))
    before = sorted(map(str, tmp_path.rglob("*")))
    with (
        checkpoint.manager(str(tmp_path), keep=5) as checkpoints,
        pytest.raises(OSError, match="No checkpoint in .* can be read.*step 7: .*step 3: "),
    ):
        checkpoint.restore_latest(checkpoints, state_with(0, jnp.zeros(7)))
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_nothing_to_restore(tmp_path):
    with checkpoint.manager(str(tmp_path), keep=1) as checkpoints:
        assert checkpoint.restore_latest(checkpoints, state_with(0, jnp.zeros(2))) is None


def weights(step):
    """A state of 4 MB that does not compress."""
    return state_with(step, jnp.asarray(np.random.default_rng(step).normal(size=1_000_000)))


def test_a_save_that_fails_is_reported_and_leaves_nothing(tmp_path, caplog):
    """Files may not grow beyond a limit: to the writer as good as a full disk."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = tmp_path / "checkpoints"
    with checkpoint.manager(str(tmp_path), keep=2) as checkpoints:
        for step in (1, 2):
            checkpoint.save(checkpoints, weights(step))
        checkpoint.finish(checkpoints)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, unlimited[1]))
        try:
            for step in (3, 4):
                checkpoint.save(checkpoints, weights(step))
            checkpoint.finish(checkpoints)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert caplog.text.count("A checkpoint could not be written: ") == 2
        assert caplog.text.count("Training goes on; make room for what comes next.") == 2
        assert {path.name for path in folder.iterdir()} == {"1", "2"}
        for step in (5, 6, 7):
            checkpoint.save(checkpoints, weights(step))
        checkpoint.finish(checkpoints)
        assert {path.name for path in folder.iterdir()} == {"6", "7"}
        assert_same(checkpoint.restore_latest(checkpoints, weights(0)), weights(7))


def test_what_does_not_fit_on_the_disk_is_not_begun(tmp_path, caplog, monkeypatch):
    with checkpoint.manager(str(tmp_path), keep=2) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
            checkpoint.save(checkpoints, weights(1))
        assert "step 1 could not be written: it needs 4 MB, and 1 MB are free." in caplog.text
        checkpoint.save(checkpoints, weights(2))
        checkpoint.finish(checkpoints)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def poisoned(monkeypatch, steps):
    """Pixels of certain steps are not finite, as a broken augmentation would make them."""
    augment = train_step.augment

    def broken(key, images, *rest):
        bad = jnp.any(jnp.stack([jnp.all(key == train_step.step_key(0, s)) for s in steps]))
        return augment(key, images, *rest) + jnp.where(bad, jnp.nan, 0.0)

    monkeypatch.setattr(train_step, "augment", broken)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_config, tmp_path, monkeypatch):
    tiny_config.eval.baselines = False
    poisoned(monkeypatch, [5])
    with pytest.raises(train.Diverged, match="not finite at step 6.*nonfinite.json"):
        train.train_and_evaluate(tiny_config, str(tmp_path))
    led = json.loads((tmp_path / "nonfinite.json").read_text())
    assert led["step"] == 6 and led["metrics"]["loss"] == "nan"
    assert len(led["images"]) == 12 and led["images"][0].count("-") == 1
    assert state_of(tiny_config, str(tmp_path)).step == 4


def test_steps_that_are_not_finite_may_be_passed_over(tiny_config, tmp_path, monkeypatch):
    tiny_config.eval.baselines = False
    tiny_config.train.skip_nonfinite = 1
    poisoned(monkeypatch, [5, 8])  # one at a time
    train.train_and_evaluate(tiny_config, str(tmp_path / "run"))
    state = state_of(tiny_config, str(tmp_path / "run"))
    assert state.step == 12 and state.skipped == 0
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(state.params))


def test_a_profile_of_some_steps(tiny_config, tmp_path):
    tiny_config.eval.baselines = False
    tiny_config.profile_steps = "3:5"
    train.train_and_evaluate(tiny_config, str(tmp_path))
    assert list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))
    train.profile("3:5", first=3, step=5, folder=tmp_path, metrics=None)  # resumed within it
