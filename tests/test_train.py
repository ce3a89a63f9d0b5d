"""Runs that are trained, that stop and go on."""

import itertools
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgd_jax import checkpoint, run, train, train_step
from cgd_jax.data import batches
from cgd_jax.evaluation import evaluate
from cgd_jax.models import pretrained
from cgd_jax.models.cgd import network_params
from cgd_jax.preprocess import EFFICIENTNET_LITE, IMAGENET
from cgd_jax.reports.history import read_history
from cgd_jax.reports.throughput import Meter
from cgd_jax.runtime import interrupts, locks
from cgd_jax.runtime.errors import ConfigError
from tests.variables import assert_same


def history_without_speed(folder):
    """The rows of a run's history, without how fast it was."""
    speed = {"images_per_second", "input_wait", "tflops_per_second"}
    rows = read_history(folder / "history.csv")
    return [{name: row[name] for name in row if name not in speed} for row in rows]


def state_of(config, workdir, step):
    """The state of a checkpoint."""
    shapes = run.create_run(config, workdir).state_shapes()
    with checkpoint.manager(workdir) as checkpoints:
        return checkpoint.restore(checkpoints, shapes, step)


def poison(monkeypatch, step):
    """The pixels of a step are not finite, as a broken augmentation would make them."""
    augment = train_step.augment

    def broken(key, images, *rest):
        bad = jnp.all(key == train_step.step_key(0, step - 1))
        return augment(key, images, *rest) + jnp.where(bad, jnp.nan, 0.0)

    monkeypatch.setattr(train_step, "augment", broken)


@pytest.mark.slow
def test_a_network_whose_training_was_interrupted_is_the_same(
    tiny_config, tmp_path, monkeypatch, capsys, fully_optimized
):
    """With all that losses draw, learn and remember, averaged weights, and a step passed over."""
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    tiny_config.eval.baselines = False
    tiny_config.loss.update(ranking="contrastive", miner="distance_weighted")
    tiny_config.loss.update(memory=30, memory_from=1, classification="cosface", sub_centers=2)
    tiny_config.optimizer.ema_decay = 0.5
    tiny_config.train.update(steps=8, eval_every=4, checkpoint_every=3, skip_nonfinite=1)
    poison(monkeypatch, 6)
    results = train.train_and_evaluate(tiny_config, whole)
    with monkeypatch.context() as patch:
        count, steps = Meter.count, itertools.count(1)

        def count_and_interrupt(meter):
            count(meter)
            if next(steps) == 2:
                signal.raise_signal(signal.SIGTERM)

        patch.setattr(Meter, "count", count_and_interrupt)
        with pytest.raises(SystemExit) as stop:
            train.train_and_evaluate(tiny_config, parts)
    assert stop.value.code == interrupts.EXIT_TEMPFAIL == 75
    output = capsys.readouterr().out
    assert "Stopped at step 2 of 8; the same command goes on from " in output
    assert f"from the checkpoint of step 2 in {parts}" in output
    resumed = train.train_and_evaluate(tiny_config, parts)
    resumed["costs"]["embed_seconds"] = results["costs"]["embed_seconds"]  # another time
    assert resumed == results
    assert "Resumed from the checkpoint of step 2." in capsys.readouterr().out
    state = state_of(tiny_config, whole, 8)
    assert_same(state, state_of(tiny_config, parts, 8))
    assert history_without_speed(tmp_path / "whole") == history_without_speed(tmp_path / "parts")

    # The step without a finite loss has left nothing behind.
    assert state.skipped == 0
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(state))
    first = run.create_run(tiny_config, whole).create_state()
    assert state.memory.vectors.shape == (30, 8) and np.all(np.asarray(state.memory.labels) >= 0)
    np.testing.assert_allclose(np.linalg.norm(state.memory.vectors, axis=1), 1, rtol=1e-5)
    moved = np.abs(state.params["loss"]["centers"] - first.params["loss"]["centers"])
    assert moved.shape == (6, 2, 8) and moved.max() > 1e-3

    # What is evaluated and taken on is the average, without what belongs to the losses.
    weights, _, step = checkpoint.read_weights(whole)
    assert step == results["step"]
    best = state_of(tiny_config, whole, step)
    assert_same(weights["params"], network_params(best.average))
    assert_same(weights["params"], best.variables()["params"])
    assert "loss" not in weights["params"]
    gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), best.params, best.average)
    assert max(jax.tree.leaves(gap)) > 1e-4
    averaged = run.create_run(tiny_config, whole)
    recalls = evaluate.evaluate_step(averaged, best.replace(params=None), [])
    assert recalls["recall@1"] == pytest.approx(results["metrics"]["recall@1"])
    model = tiny_config.model.copy_and_resolve_references()
    model.pretrained = whole
    begun = run.load_pretrained(model, first)
    assert begun.params["backbone"].keys() == weights["params"]["backbone"].keys()
    assert_same(begun.params["loss"], first.params["loss"])


def test_a_run_leaves_what_the_readme_promises(finished_run):
    _, folder, results = finished_run
    names = {"config.json", "history.csv", "curves.png", "retrievals.png", "results.json"}
    assert names | {"per_class.csv", "data.json"} <= {path.name for path in folder.iterdir()}
    assert list(folder.glob("tensorboard/events*")) and not list(folder.glob("*.tmp"))
    assert set(results["baselines"]) == {"raw pixels", "untrained network"}
    history = read_history(folder / "history.csv")
    assert results["metrics"]["recall@1"] == pytest.approx(history[-1]["recall@1"], abs=1e-5)
    # Colors are easy: it has learned something, and rows are plausible.
    assert history[-1]["classification_loss"] < history[0]["classification_loss"]
    assert results["metrics"]["recall@1"] > 0.3
    # Whether it collapsed can be seen, while it trains and of what was tested.
    signs = {"active_triplets", "hardest_positive", "ranking_gradient", "mean_embedding_norm"}
    assert signs <= history[0].keys()
    assert 0 < results["geometry"]["hardest_negative"] <= results["geometry"]["negative_distance"]
    assert 0 < results["geometry"]["mean_embedding_norm"] <= 1
    assert results["classes"] == {"tested": 6, "trained on": 0}
    assert (results["step"], results["chosen by"]) == (12, "last step")
    # Evaluation by itself gives what training reported, and measures any step kept.
    assert evaluate.evaluate_run(str(folder))["metrics"] == results["metrics"]
    earlier = evaluate.evaluate_run(str(folder), 8)
    assert earlier["step"] == 8 and earlier["metrics"] != results["metrics"]
    assert (folder / "eval-8.json").exists() and (folder / "retrievals-8.png").exists()
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 5; the steps kept are: "):
        evaluate.evaluate_run(str(folder), 5)


def test_inference_options_are_measured_beside_the_plain_embedding(
    finished_run, tmp_path, capsys, drawn
):
    config, finished, plain = finished_run
    folder = shutil.copytree(finished, tmp_path / "run")
    step, config = plain["step"], config.copy_and_resolve_references()
    assert plain["with options"] == {}
    config.eval.update(
        vector="descriptor_S",
        flip=True,
        scales=(1.0, 1.5),
        scales_p=3.0,
        whitening_dim=3,
        whitening="pairs",
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
    result = evaluate.evaluate_run(str(folder), config=config)
    assert list(result["with options"]) == [
        "descriptor_S, flip, scales 1 1.5, p 3",
        "whitened by pairs to 3, database augmented by 1, queries expanded by 2",
        "re-ranked",
    ]
    for values in result["with options"].values():
        assert 0 <= values["recall@1"] <= 1
    assert result["metrics"]["recall@1"] == plain["metrics"]["recall@1"]
    assert 0 <= result["metrics"]["nmi"] <= 1
    found = result["complementarity"]
    assert found["queries"] == 24 and list(found["branches"]) == ["S", "G"]
    assert found["combined"] == plain["metrics"]["recall@1"]
    assert found == json.loads((folder / f"eval-{step}.json").read_text())["complementarity"]
    assert "| S, G " in (folder / f"complementarity-{step}.md").read_text()
    assert "right alone" in capsys.readouterr().out
    retrievals, embeddings = drawn
    assert f"R@1 = {plain['metrics']['recall@1']:.1%}\n" in retrievals.get_suptitle()
    assert (folder / f"retrievals-{step}.png").exists()
    (legend,) = embeddings.legends
    assert f"blobs, CGD SG, step {step}: PCA, " in legend.get_title().get_text()
    names = {text.get_text() for text in legend.get_texts()}
    assert names == {f"colour {label}" for label in range(6, 12)}
    assert (folder / f"embeddings-{step}.png").exists()
    projector = folder / "tensorboard/projector"
    assert np.loadtxt(projector / "vectors.tsv").shape == (24, 8)
    assert (projector / "metadata.tsv").read_text().splitlines()[1] == "colour 6\t6\t6-0\tquery"
    assert not list(folder.rglob("*.tmp"))
    saved = np.load(folder / "embeddings.npz")
    assert saved["query"].shape == (24, 4)
    np.testing.assert_allclose(np.linalg.norm(saved["query"], axis=1), 1, atol=1e-5)
    assert list(saved["query_ids"][:2]) == ["6-0", "6-1"] and saved["query_labels"][0] == 6
    config.eval.update(projection="", projector=False, complementarity=False, clustering=False)
    config.eval.update(whitening_dim=17, database_augmentation=0, query_expansion=0)
    config.eval.whitening = "pca"
    again = evaluate.evaluate_run(str(folder), config=config)
    assert list(again["with options"]) == [list(result["with options"])[i] for i in (0, 2)]
    assert "Not measured, whitened to 17: dim must be" in capsys.readouterr().out
    config.model.embedding_dim = 16
    with pytest.raises(ConfigError, match="model.embedding_dim: 8 → 16"):
        evaluate.evaluate_run(str(folder), config=config)


@pytest.mark.slow
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


def test_a_run_does_not_go_on_with_other_data(finished_run, tmp_path, capsys):
    config, finished, _ = finished_run
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
    assert train.train_and_evaluate(config, str(folder))["classes"]["trained on"] == 0
    assert "Classes never seen in training, per cent:" in capsys.readouterr().out
    assert not (folder / "data.json").exists(), "what it was trained on is not known"


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
