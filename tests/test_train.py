"""Runs that are trained, that stop and go on."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgd_jax import checkpoint, evaluate, run, train, train_step, workdir
from cgd_jax.config import to_dict
from cgd_jax.data import batches
from cgd_jax.models import pretrained
from cgd_jax.preprocess import EFFICIENTNET_LITE, IMAGENET
from cgd_jax.reports.history import History, read_history
from cgd_jax.runtime import files, interrupts, locks
from cgd_jax.runtime.errors import ConfigError
from tests.variables import assert_same


def state_of(config, workdir):
    """The state of the latest checkpoint."""
    shapes = run.create_run(config, workdir).state_shapes()
    with checkpoint.manager(workdir) as checkpoints:
        return checkpoint.restore(checkpoints, shapes, checkpoints.latest_step())


def interrupt_at(monkeypatch, step, number=signal.SIGINT):
    """A signal arrives while the row of a step is written."""
    add = History.add

    def add_and_interrupt(self, at, values):
        add(self, at, values)
        if at == step:
            signal.raise_signal(number)

    monkeypatch.setattr(History, "add", add_and_interrupt)


def interrupted(number, *args, **options):
    """Takes the place of a long evaluation that a signal comes into."""
    signal.raise_signal(number)
    raise AssertionError("it went on")


def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(
    tiny_config, tmp_path, monkeypatch, capsys, fully_optimized
):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    tiny_config.eval.baselines = False
    monkeypatch.setattr(train.plots, "plot_curves", lambda *_: None)
    # What the losses draw, learn and remember is resumed too.
    tiny_config.loss.update(ranking="contrastive", miner="distance_weighted")
    tiny_config.loss.update(memory=30, memory_from=1, classification="cosface", sub_centers=2)
    tiny_config.train.log_every = 1
    before = signal.getsignal(signal.SIGINT)
    results = train.train_and_evaluate(tiny_config, whole)
    # At a step at which no checkpoint is due; and while the steps 6 and 12 are evaluated.
    for step, number in [(6, signal.SIGINT), (11, signal.SIGTERM), (12, signal.SIGTERM)]:
        with monkeypatch.context() as patch:
            if step % 6:
                interrupt_at(patch, step - 1, number)
            else:
                patch.setattr(evaluate.metrics, "recall_at_k", partial(interrupted, number))
            with pytest.raises(SystemExit) as stop:
                train.train_and_evaluate(tiny_config, parts)
        assert stop.value.code == interrupts.EXIT_TEMPFAIL == 75
        assert signal.getsignal(signal.SIGINT) == before
        output = capsys.readouterr().out
        assert f"Stopped at step {step} of 12; the same command goes on from " in output
        assert f"from the checkpoint of step {step} in {parts}" in output
        with checkpoint.manager(parts) as checkpoints:
            assert checkpoints.latest_step() == step
    resumed = train.train_and_evaluate(tiny_config, parts)
    assert "Resumed from the checkpoint of step 12" in capsys.readouterr().out
    assert resumed == results
    state = state_of(tiny_config, whole)
    assert_same(state, state_of(tiny_config, parts))
    histories = [read_history(Path(w, "history.csv")) for w in (whole, parts)]
    assert [row["step"] for row in histories[1]] == list(range(1, 13))
    for ours, theirs in zip(*histories, strict=True):
        assert "input_wait" in ours and "tflops_per_second" in ours
        for name in ("images_per_second", "input_wait", "tflops_per_second"):
            del ours[name], theirs[name]
        assert ours == theirs

    first = run.create_run(tiny_config, whole).create_state()
    assert state.memory.vectors.shape == (30, 8) and np.all(np.asarray(state.memory.labels) >= 0)
    np.testing.assert_allclose(np.linalg.norm(state.memory.vectors, axis=1), 1, rtol=1e-5)
    moved = np.abs(state.params["loss"]["centers"] - first.params["loss"]["centers"])
    assert moved.shape == (6, 2, 8) and moved.max() > 1e-3
    # They are no part of the network, with which another run may begin.
    weights, _, _ = checkpoint.read_weights(whole, 12)
    assert "loss" not in weights["params"] and "loss" not in state.variables()["params"]
    assert_same(weights["params"], state.variables()["params"])
    model = tiny_config.model.copy_and_resolve_references()
    model.pretrained = whole
    begun = run.load_pretrained(model, first)
    assert begun.params["backbone"].keys() == weights["params"]["backbone"].keys()
    assert_same(begun.params["loss"], first.params["loss"])


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
    history = read_history(workdir / "history.csv")
    best = max((row for row in history if "recall@1" in row), key=lambda r: r["recall@1"])
    assert results["metrics"]["recall@1"] == pytest.approx(best["recall@1"], abs=1e-5)
    # Colours are easy: it has learned something, and rows are plausible.
    assert history[-1]["classification_loss"] < history[0]["classification_loss"]
    assert results["metrics"]["recall@1"] > 0.3
    # Whether it collapsed can be seen, while it trains and of what was tested.
    signs = {"active_triplets", "hardest_positive", "ranking_gradient", "mean_embedding_norm"}
    assert signs <= history[0].keys()
    assert 0 < results["geometry"]["hardest_negative"] <= results["geometry"]["negative_distance"]
    # Evaluation by itself gives what training logged, for the best and for any step kept.
    assert evaluate.evaluate_run(str(workdir))["metrics"] == results["metrics"]
    last = evaluate.evaluate_run(str(workdir), 12)
    assert last["metrics"]["recall@1"] == pytest.approx(history[-1]["recall@1"], abs=1e-5)
    assert (workdir / "eval-12.json").exists() and (workdir / "retrievals-12.png").exists()
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 5; the steps kept are: "):
        evaluate.evaluate_run(str(workdir), 5)
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
    result = evaluate.evaluate_run(str(tmp_path), config=tiny_config)
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
    assert saved["query"].shape == (24, 4)
    np.testing.assert_allclose(np.linalg.norm(saved["query"], axis=1), 1, atol=1e-5)
    assert list(saved["query_ids"][:2]) == ["6-0", "6-1"] and saved["query_labels"][0] == 6
    tiny_config.eval.update(projection="", projector=False, complementarity=False, clustering=False)
    tiny_config.eval.update(whitening_dim=17, database_augmentation=0, query_expansion=0)
    again = evaluate.evaluate_run(str(tmp_path), config=tiny_config)
    assert list(again["with options"]) == [list(result["with options"])[i] for i in (0, 2)]
    assert "Not measured, whitened to 17: dim must be" in capsys.readouterr().out
    tiny_config.model.embedding_dim = 16
    with pytest.raises(ConfigError, match="model.embedding_dim: 8 → 16"):
        evaluate.evaluate_run(str(tmp_path), config=tiny_config)


def test_a_run_in_bfloat16_measures_itself_in_float32(tiny_config, tmp_path):
    tiny_config.model.dtype = "bfloat16"  # what "auto" is on a GPU and a TPU
    tiny_config.train.update(steps=2, log_every=1, eval_every=2)
    tiny_config.eval.baselines = False
    folder = tmp_path / "run"
    train.train_and_evaluate(tiny_config, str(folder))
    rows = read_history(folder / "history.csv")
    norms = np.float32([[row["ranking_gradient"], row["classification_gradient"]] for row in rows])
    # A number of bfloat16 has 16 bits of zeros behind it.
    assert norms.shape == (2, 2) and np.all(norms.view(np.uint32) & 0xFFFF)


def test_the_seed_decides_weights_batches_and_augmentation(tiny_config, tmp_path):
    kernels, positions, keys = [], [], []
    for seed in (0, 0, 1):
        tiny_config.seed = seed
        begun = run.create_run(tiny_config, str(tmp_path / "run"))
        kernels.append(np.asarray(begun.create_state().params["backbone"]["conv1"]["kernel"]))
        positions.append(batches.batch_positions(tiny_config, begun.labels)(3))
        keys.append(jax.random.key_data(train_step.step_key(seed, 3)))
    for first, again, other in (kernels, positions, keys):
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)


def test_a_work_folder_of_another_config_is_refused(tiny_config, tmp_path):
    workdir.check_workdir(tiny_config, str(tmp_path))  # nothing there yet
    files.write_json(tmp_path / "config.json", to_dict(tiny_config))
    tiny_config.train.log_every = 1  # free to change
    workdir.check_workdir(tiny_config, str(tmp_path))
    tiny_config.optimizer.learning_rate = 0.5
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate: 0.004 → 0.5"):
        workdir.check_workdir(tiny_config, str(tmp_path))


def test_a_second_run_in_the_same_folder_is_refused(tiny_config, tmp_path):
    workdir = str(tmp_path / "run")
    with (
        locks.one_run_in(workdir),
        pytest.raises(
            BlockingIOError, match=rf"still at work \(process {os.getpid()} on .*--workdir"
        ),
    ):
        train.train_and_evaluate(tiny_config, workdir)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    with locks.one_run_in(workdir):  # it is free again
        pass


def test_a_run_that_cannot_begin_leaves_no_folder(tiny_config, tmp_path):
    tiny_config.train.classes_per_batch = 7
    with pytest.raises(ConfigError):
        train.train_and_evaluate(tiny_config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_pretrained_weights_fill_the_backbone(tiny_config, tmp_path):
    drawn = run.create_run(tiny_config, str(tmp_path / "none")).create_state()
    variables = {"params": drawn.params, "batch_stats": drawn.batch_stats}
    doubled = jax.tree.map(lambda a: 2 * np.asarray(a) + 1, variables)
    path = tmp_path / "weights.safetensors"
    pretrained.save(path, doubled, EFFICIENTNET_LITE)
    tiny_config.model.pretrained = str(path)
    state = run.load_pretrained(tiny_config.model, drawn)
    kernel = state.params["backbone"]["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel, doubled["params"]["backbone"]["conv1"]["kernel"])
    assert kernel.sharding == drawn.params["backbone"]["conv1"]["kernel"].sharding
    # Whatever was normalized otherwise before.
    np.testing.assert_array_equal(drawn.normalization.mean, IMAGENET.mean)
    np.testing.assert_array_equal(state.normalization.mean, EFFICIENTNET_LITE.mean)
    np.testing.assert_array_equal(state.normalization.std, EFFICIENTNET_LITE.std)
    tiny_config.model.pretrained = str(tmp_path / "nowhere.safetensors")
    with pytest.raises(ConfigError, match="model.pretrained: .*nowhere.safetensors"):
        train.train_and_evaluate(tiny_config, str(tmp_path / "run"))


def test_too_many_classes_for_the_data_set(tiny_config, tmp_path):
    tiny_config.train.classes_per_batch = 7
    with pytest.raises(
        ConfigError,
        match="blobs has 6 classes to train on, and a batch needs 7: give ",
    ):
        run.create_run(tiny_config, str(tmp_path))


def test_evaluating_a_folder_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config.json.*--workdir="):
        evaluate.evaluate_run(str(tmp_path))


def test_an_averaged_run_evaluates_its_average(tiny_config, tmp_path):
    tiny_config.optimizer.ema_decay = 0.5
    tiny_config.eval.baselines = False
    tiny_config.train.steps = 6
    result = train.train_and_evaluate(tiny_config, str(tmp_path))
    average, _, step = checkpoint.read_weights(tmp_path)
    assert step == result["step"] == 6
    state = state_of(tiny_config, str(tmp_path))
    assert_same(state.average, average["params"])
    assert_same(state.variables()["params"], state.average)
    gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, state.average)
    assert max(jax.tree.leaves(gap)) > 1e-4
    averaged = run.create_run(tiny_config, str(tmp_path))
    recalls = evaluate.evaluate_step(averaged, state.replace(params=None), [])
    assert recalls["recall@1"] == pytest.approx(result["metrics"]["recall@1"])


def poisoned(monkeypatch, steps):
    """Pixels of certain steps are not finite, as a broken augmentation would make them."""
    augment = train_step.augment

    def broken(key, images, *rest):
        bad = jnp.any(jnp.stack([jnp.all(key == train_step.step_key(0, s)) for s in steps]))
        return augment(key, images, *rest) + jnp.where(bad, jnp.nan, 0.0)

    monkeypatch.setattr(train_step, "augment", broken)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_config, tmp_path, monkeypatch):
    tiny_config.eval.baselines = False
    poisoned(monkeypatch, [5, 8])
    with pytest.raises(train.Diverged, match="not finite at step 6.*nonfinite.json"):
        train.train_and_evaluate(tiny_config, str(tmp_path))
    led = json.loads((tmp_path / "nonfinite.json").read_text())
    assert led["step"] == 6 and led["metrics"]["loss"] == "nan"
    assert len(led["images"]) == 12 and led["images"][0].count("-") == 1
    assert state_of(tiny_config, str(tmp_path)).step == 4


def test_a_step_that_is_not_finite_is_not_saved(tiny_config, tmp_path, monkeypatch):
    """Though nothing is logged at it: else the next start would pass over it."""
    tiny_config.eval.baselines = False
    tiny_config.train.log_every = 5
    poisoned(monkeypatch, [7])
    for _ in range(2):
        with pytest.raises(train.Diverged, match="not finite at step 8"):
            train.train_and_evaluate(tiny_config, str(tmp_path))
        assert state_of(tiny_config, str(tmp_path)).step == 6


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


def test_a_run_does_not_go_on_with_other_data(finished_run, tmp_path, capsys):
    config, finished, result = finished_run
    assert result["classes"] == {"tested": 6, "trained on": 0}
    assert 0 < result["geometry"]["mean_embedding_norm"] <= 1
    folder = shutil.copytree(finished, tmp_path / "run")
    recorded = json.loads((folder / "data.json").read_text())
    # As if two classes that are tested now had been trained on under these names.
    recorded["train"]["per class"][:2] = [["colour 6", 3], ["colour 7", 4]]
    (folder / "data.json").write_text(json.dumps(recorded))
    gone = r"(?s)another data set.*classes that are gone \(2\): colour 6"
    with pytest.raises(ConfigError, match=gone):
        train.train_and_evaluate(config, str(folder))
    capsys.readouterr()
    changed = evaluate.evaluate_run(str(folder), config=config)
    said = capsys.readouterr().out
    assert "The data set is not the one that the run was trained on: train: " in said
    assert changed["classes"] == {"tested": 6, "trained on": 2}
    assert "Classes, 2 of 6 seen in training, per cent:" in said and "never seen" not in said
    (folder / "data.json").unlink()  # a run of version 0.1.0
    assert evaluate.evaluate_run(str(folder), config=config)["classes"]["trained on"] == 0
    assert "Classes never seen in training, per cent:" in capsys.readouterr().out


def test_options_that_fail_do_not_cost_the_plain_results(finished_run, monkeypatch, capsys):
    config, finished, result = finished_run
    wanted = config.copy_and_resolve_references()
    wanted.eval.update(query_expansion=2, rerank=True)

    def fail(*arguments, **options):
        raise ValueError("too few neighbours")

    monkeypatch.setattr("cgd_jax.rerank.k_reciprocal", fail)
    monkeypatch.setattr("cgd_jax.rerank.expand_queries", fail)
    again = evaluate.evaluate_run(str(finished), config=wanted)
    said = capsys.readouterr().out
    assert again["metrics"] == result["metrics"] and again["with options"] == {}
    assert "Not measured, queries expanded by 2: too few neighbours" in said
    assert "Not measured, re-ranked: too few neighbours" in said


def test_pretrained_weights_of_a_run_below_the_home(finished_run, monkeypatch):
    config, finished, _ = finished_run
    monkeypatch.setenv("HOME", str(finished.parent))
    drawn = run.create_run(config, str(finished)).create_state()
    model = config.model.copy_and_resolve_references()
    model.pretrained = f"~/{finished.name}"
    loaded = run.load_pretrained(model, drawn)
    weights, _, _ = checkpoint.read_weights(finished)
    assert_same(loaded.params["backbone"], weights["params"]["backbone"])


def test_a_run_of_an_older_version_does_not_claim_to_know_its_data(finished_run, tmp_path):
    config, finished, _ = finished_run
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "data.json").unlink()
    train.train_and_evaluate(config, str(folder))
    assert not (folder / "data.json").exists()


@pytest.mark.parametrize(
    "go_on", [train.train_and_evaluate, lambda _, folder: evaluate.evaluate_run(folder)]
)
def test_more_classes_than_a_run_of_an_older_version_knew(
    finished_run, tmp_path, monkeypatch, go_on, caplog
):
    config, finished, _ = finished_run
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "data.json").unlink()
    before = sorted(path.name for path in (folder / "checkpoints").iterdir())
    real = run.create_model
    monkeypatch.setattr(run, "create_model", lambda model, n: real(model, n + 1))
    with pytest.raises(ConfigError, match="was trained on 6 classes, and the data set has 7"):
        go_on(config, str(folder))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == before
    assert "damaged" not in caplog.text
