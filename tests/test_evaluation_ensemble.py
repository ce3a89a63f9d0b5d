"""Several runs as one network."""

import numpy as np
import pytest

from cgd_jax import train
from cgd_jax.evaluation import ensemble
from cgd_jax.evaluation.embed import Embeddings
from cgd_jax.run import open_run
from cgd_jax.runtime.errors import ConfigError
from tests.test_main import run_here


def test_the_similarity_of_joined_embeddings_is_the_mean_of_the_similarities():
    rng = np.random.default_rng(0)
    parts = [Embeddings(*rng.normal(size=(2, 5, dim)).astype(np.float32)) for dim in (3, 7)]
    joined = ensemble.join(parts)
    units = [[x / np.linalg.norm(x, axis=1, keepdims=True) for x in part] for part in parts]
    expected = np.mean([query @ gallery.T for query, gallery in units], 0)
    np.testing.assert_allclose(joined.query @ joined.gallery.T, expected, atol=1e-6)
    assert joined.query.shape == (5, 10)
    assert ensemble.join([part._replace(gallery=None) for part in parts]).gallery is None


@pytest.mark.slow
def test_two_runs_together(finished_run, tmp_path):
    config, finished, result = finished_run
    other = config.copy_and_resolve_references()
    other.seed = 1
    other.train.steps = 2
    train.train_and_evaluate(other, str(tmp_path / "other"))
    status, output, errors = run_here("eval", str(finished), str(tmp_path / "other"))
    assert (status, errors) == (0, "")
    assert "2 runs together, PCA to 8" in output and "time to embed" in output
    measured = ensemble.evaluate_together([str(finished), str(tmp_path / "other")])
    alone, _, both, reduced = measured.values()
    assert alone["recall@1"] == result["metrics"]["recall@1"]
    assert (both["dimension"], reduced["dimension"]) == (16, 8)
    assert both["parameters"] == 2 * alone["parameters"]
    # A network with itself is itself.
    same = ensemble.evaluate_together([str(finished), str(finished)])
    assert list(same.values())[1]["map@r"] == pytest.approx(list(same.values())[0]["map@r"])


def test_few_training_images_span_fewer_dimensions(finished_run, monkeypatch):
    _, finished, _ = finished_run
    whole = ensemble.embed_training
    monkeypatch.setattr(ensemble, "embed_training", lambda run, state: whole(run, state)[:4])
    *_, reduced = ensemble.evaluate_together([str(finished), str(finished)]).values()
    assert reduced["dimension"] == 3


def test_runs_on_different_images_are_refused(finished_run, monkeypatch):
    _, finished, _ = finished_run
    opened = []

    def open_other(workdir):
        run, state = open_run(workdir)
        opened.append(run)
        ids = [f"{len(opened)} {id}" for id in run.dataset.query.ids]
        query = run.dataset.query._replace(ids=ids)
        return run._replace(dataset=run.dataset._replace(query=query)), state

    monkeypatch.setattr(ensemble, "open_run", open_other)
    with pytest.raises(ConfigError, match="are tested on different images"):
        ensemble.evaluate_together([str(finished), str(finished)])
