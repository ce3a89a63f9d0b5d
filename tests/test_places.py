"""Training and evaluation where what is right is no class: whole runs on drawn streets."""

import json

import numpy as np
import pytest

from cgd_jax import train
from cgd_jax.config import differences, to_dict
from cgd_jax.data import Dataset, Split, facades, truth
from cgd_jax.data.load import load_dataset
from cgd_jax.evaluation import evaluate
from cgd_jax.evaluation.embed import Embeddings
from cgd_jax.rules import validate
from cgd_jax.runtime.errors import ConfigError, InputError
from configs import facades as facades_config
from configs import gldv2, gsv_cities
from tests.dataset_samples import picture, write
from tests.test_data_places import PLACES, revisited_files


@pytest.fixture
def small_streets(monkeypatch):
    monkeypatch.setattr(facades, "TRAIN", range(1))
    monkeypatch.setattr(facades, "TEST", range(24, 25))


@pytest.fixture
def config(tiny_config):
    tiny_config.data.name = "facades"
    tiny_config.eval.rerank = True
    tiny_config.eval.bootstrap = 20
    return tiny_config


def texts(figure):
    return [text.get_text() for text in figure.texts]


@pytest.mark.slow
def test_a_run_on_streets(small_streets, config, tmp_path, drawn):
    config.train.steps = 6
    config.train.eval_every = 6
    workdir = str(tmp_path / "run")
    results = train.train_and_evaluate(config, workdir)
    found = results["metrics"]
    assert found["queries"] == 2 * facades.QUERIES and found["excluded"] == 0
    assert 0 < found["recall@1"] <= found["recall@8"] <= 1
    low, high = found["confidence"]["recall@1"]
    assert low <= found["recall@1"] <= high
    assert "re-ranked" in results["with options"]
    assert {"raw pixels", "untrained network"} == results["baselines"].keys()
    assert (
        (tmp_path / "run" / "per_class.csv").read_text().startswith("name,class,queries,recall@1")
    )

    radius = next(f for f in drawn if f.axes and f.axes[0].get_xlabel() == "metres")
    curve = radius.axes[0].lines[0].get_xydata()
    at = np.interp(25, *curve.T) / 100
    assert at == pytest.approx(found["recall@1"], abs=0.05)
    retrievals = next(f for f in drawn if any(t.endswith(" m") for t in texts(f)))
    assert sum(t.endswith(" m") for t in texts(retrievals)) >= 64

    wider = config.copy_and_resolve_references()
    wider.data.radius = 1e5
    assert differences(to_dict(config), to_dict(wider)) == []
    again = evaluate.evaluate_run(workdir, config=wider)
    assert again["metrics"]["recall@1"] == 1
    assert json.loads((tmp_path / "run" / "results.json").read_text())["metrics"] == found


def test_a_network_of_one_set_is_measured_on_another(config, tmp_path):
    config.data.name = "blobs"
    config.data.test_name = "places"
    config.data.test_source = str(write(tmp_path / "in", PLACES))
    dataset = load_dataset(config.data)
    assert len(dataset.query.labels) == len(dataset.gallery.labels) == 2
    assert set(dataset.train.labels).isdisjoint([*dataset.query.labels, *dataset.gallery.labels])
    assert set(dataset.query.labels) <= dataset.query.class_names.keys()
    right = dataset.is_match(np.array([0, 1]), np.array([[1, 0], [0, 1]]))
    assert right.tolist() == [[False, True], [False, False]]
    with pytest.raises(ConfigError, match="complementarity.*no class"):
        config.eval.complementarity = True
        train.train_and_evaluate(config, str(tmp_path / "run"))


@pytest.mark.slow
def test_revisited_oxford_is_measured_after_any_training(config, tmp_path):
    config.data.name = "blobs"
    config.data.test_name = "roxford5k"
    config.data.test_source = str(write(tmp_path / "in", revisited_files("roxford5k")))
    config.data.allow_incomplete = True
    config.eval.ks = (1,)
    results = train.train_and_evaluate(config, str(tmp_path / "run"))
    measured = results["metrics"]
    assert {"map_easy", "map_medium", "map_hard", "mp@1_easy"} <= measured.keys()
    assert measured["queries"] == 2 and measured["recall@1"] == measured["mp@1_medium"]
    # Junk is not taken out of a list that was re-ranked.
    assert "re-ranked" not in results["with options"]


@pytest.mark.parametrize("lost, recall", [(0.0, 0.5), (np.nan, 1.0)])
def test_queries_with_nothing_near_them_count_alike_after_reranking(lost, recall):
    stored = {name: [np.nan, x] for name, x in {"a": 0, "b": 900, "c": 1, "d": 200}.items()}
    vectors = np.eye(3)[[0, 1, 0, 1]].astype(np.float32) + 0.1
    query, gallery = (Split(None, np.zeros(2, int), [*names], {}) for names in ("ab", "cd"))
    query = query._replace(truth=truth.of_positions(stored, "ab", "cd", lost=lost))
    embeddings = Embeddings(vectors[:2], vectors[2:])
    dataset = Dataset(None, query, gallery)
    measured = evaluate.reranked_recall(embeddings, dataset, (1,), None)
    assert measured == {"recall@1": recall}


def test_what_is_missing_is_said(config, tmp_path):
    config.data.name = "places"
    config.data.source = str(write(tmp_path / "in", PLACES))
    with pytest.raises(InputError, match="places has no images to train on.*test_name"):
        load_dataset(config.data)
    far = {name: picture(i) for i, name in enumerate(PLACES) if "0448020.00" not in name}
    config.data.name, config.data.test_name = "blobs", "places"
    config.data.source, config.data.test_source = "", str(write(tmp_path / "far", far))
    with pytest.raises(InputError, match="None of the 1 queries of places.*radius"):
        load_dataset(config.data)
    config.data.test_name, config.data.test_source = "gsv_cities", ""
    with pytest.raises(InputError, match="gsv_cities: --config.data.test_source says.*not set"):
        load_dataset(config.data)
    config.data.test_name, config.data.test_source = "", "somewhere"
    with pytest.raises(ConfigError, match="data.test_name names no data set"):
        train.train_and_evaluate(config, str(tmp_path / "run"))


@pytest.mark.parametrize("file", [facades_config, gsv_cities, gldv2])
def test_configs_are_valid(file):
    config = file.get_config()
    validate(config)
    assert config.model.descriptors == ("G" if file is gldv2 else "SG")
    if file is not facades_config:
        config = file.get_config("SG,dinov2_base")
        validate(config)
        assert config.model.pretrained == "facebook/dinov2-base"
