"""Validation classes: disjoint from what is trained on, and what a step is chosen by."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from cgd_jax import checkpoint, train, train_step
from cgd_jax.data import Dataset, Split, describe_difference, fingerprint
from cgd_jax.data.decode import decode
from cgd_jax.data.validation import hold_out
from cgd_jax.evaluation import evaluate
from cgd_jax.reports import summary
from cgd_jax.run import open_data
from cgd_jax.runtime.errors import InputError
from configs.image_folder import get_config


def split_of(labels):
    labels = np.asarray(labels)
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    names = {int(label): f"class {label}" for label in labels}
    ids = [f"image {i}" for i in range(len(labels))]
    return Split(images, labels, ids, names, contents=np.arange(len(labels)))


@pytest.fixture
def dataset():
    rng = np.random.default_rng(0)
    return Dataset(split_of(rng.integers(0, 11, 200)), split_of([20, 20, 21, 21]), None)


def test_nothing_is_held_back_unless_asked_for(dataset):
    assert hold_out(dataset) == (dataset, None)


def test_folds_are_disjoint_and_cover_all_training_classes(dataset):
    held = []
    for i in range(1, 4):
        rest, validation = hold_out(dataset, fold=f"{i}/3", seed=5)
        query = validation.query
        assert not set(rest.train.labels) & set(query.labels)
        assert set(rest.train.class_names) == set(rest.train.labels)
        assert sorted([*rest.train.ids, *query.ids]) == sorted(dataset.train.ids)
        for row in (0, len(query.labels) - 1):  # aligned as before
            at = dataset.train.ids.index(query.ids[row])
            assert dataset.train.labels[at] == query.labels[row]
            assert dataset.train.images[at] == query.images[np.array([row])][0]
        assert rest.query is dataset.query and validation.gallery is None
        held.append(set(query.labels.tolist()))
    assert set.union(*held) == set(range(11)) and sum(map(len, held)) == 11
    assert held[0] != set(hold_out(dataset, fold="1/3", seed=6)[1].query.labels.tolist())


def test_a_split_of_the_source_is_what_it_says(dataset):
    own = split_of([30, 30, 31, 31])
    with_own = dataset._replace(validation=own)
    rest, validation = hold_out(with_own)
    assert rest is with_own and validation.query is own and validation.gallery is None
    for option in ({"fraction": 0.3}, {"fold": "1/3"}):
        with pytest.raises(InputError, match="has 4 images for validation already; unset"):
            hold_out(with_own, **option)


def test_a_folder_of_validation_images_is_opened(tmp_path):
    config = get_config()
    source = tmp_path / "in"
    for part, side in (("train", 24), ("val", 16), ("test", 8)):
        for name in (f"{part} {c}/{i}.png" for c in "ab" for i in range(2)):
            path = source / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([side, *name.encode()]).integers(0, 255, (side, side, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    config.data.update(source=str(source), dir=str(tmp_path / "data"), resize=12, image_size=10)
    dataset, validation, labels = open_data(config)
    assert set(validation.query.class_names.values()) >= {"val a", "val b"}
    assert {id.split("/")[0] for id in validation.query.ids} == {"val"}
    assert validation.query.images[:].shape == (4, 10, 10, 3), "as test images are"
    assert len(labels) == 4 and set(labels) == {0, 1}
    assert {id.split("/")[0] for id in dataset.query.ids} == {"test"}
    found = fingerprint(dataset)
    assert found["validation"]["images"] == 4
    (change,) = describe_difference(found, fingerprint(dataset._replace(validation=None)))
    assert change == "validation: there is none now"
    # Those that are held back from training images of 12 pixels are read anew.
    shutil.rmtree(source / "val")
    for c in "cd":
        shutil.copytree(source / "train" / "train a", source / "train" / f"train {c}")
    config.data.validation_fraction = 0.5
    _, validation, _ = open_data(config)
    assert validation.query.images[:].shape == (4, 10, 10, 3)
    images = [decode((source / id).read_bytes(), None, 10) for id in validation.query.ids]
    np.testing.assert_array_equal(validation.query.images[:], images)


def test_a_share_of_the_classes(dataset):
    rest, validation = hold_out(dataset, 0.3)
    assert len(set(validation.query.labels)) == 3 and len(set(rest.train.labels)) == 8
    with pytest.raises(InputError, match="Of 11 training classes 1 would be held back"):
        hold_out(dataset, 0.05)


def test_a_run_is_chosen_by_validation_classes(tiny_config, tmp_path, monkeypatch, capsys):
    tiny_config.data.validation_fraction = 0.34
    tiny_config.train.update(classes_per_batch=4, eval_every=3)
    tiny_config.eval.baselines = False
    seen = []
    scripted = {3: 0.2, 6: 0.9, 9: 0.5, 12: 0.4}

    def evaluate_step(run, state, stopped_by):
        labels = set(run.validation.query.labels.tolist())
        seen.append(labels)
        assert len(labels) == 2 and not labels & set(run.dataset.train.labels.tolist())
        return {"recall@1": scripted[int(state.step)]}

    def step_once(state, images, labels):  # which step is chosen does not depend on its weights
        return state.replace(step=state.step + 1), {"loss": 0.0, "skipped": 0}

    monkeypatch.setattr(train_step, "make_train_step", lambda *_: step_once)
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_step", evaluate_step)
        results = train.train_and_evaluate(tiny_config, str(tmp_path))
    assert len(seen) == 4
    assert results["step"] == 6 and results["chosen by"] == "validation classes"
    assert results["validation"] == {"recall@1": 0.9}
    assert results["last step"]["step"] == 12
    assert 0 <= results["last step"]["metrics"]["recall@1"] <= 1
    said = " ".join(capsys.readouterr().out.split())
    assert "Step 6 was chosen by its R@1 of 90.00 on validation classes" in said
    assert "last step, 12 " in said
    assert checkpoint.read_weights(tmp_path)[2] == 6
    assert evaluate.evaluate_run(str(tmp_path))["metrics"] == results["metrics"]


@pytest.mark.slow
def test_the_best_step_on_the_test_classes_if_asked_for(tiny_config, tmp_path, monkeypatch, capsys):
    tiny_config.train.best_of_test = True
    tiny_config.eval.baselines = False
    monkeypatch.setattr(
        train, "evaluate_step", lambda run, state, _: {"recall@1": 1 / int(state.step)}
    )
    results = train.train_and_evaluate(tiny_config, str(tmp_path))
    assert results["step"] == 6 and results["chosen by"] == "test classes"
    assert "which flatters it" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_what_training_did_not_improve_is_said():
    results = {
        "baselines": {"raw pixels": {"recall@1": 0.99}, "pretrained G": {"recall@1": 0.9}},
        "metrics": {"confidence": {"recall@1": [0.89, 0.95]}},
    }
    assert "Training did not beat pretrained G (R@1 90.00)" in summary.no_better_than_before(
        results
    )
    results["metrics"]["confidence"]["recall@1"] = [0.91, 0.95]
    assert summary.no_better_than_before(results) is None
