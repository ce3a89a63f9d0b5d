"""A search for settings: on validation classes alone, stopped early, gone on with."""

import numpy as np
import pytest

from cgd_jax.evaluation import evaluate
from cgd_jax.run import open_data
from cgd_jax.runtime.errors import ConfigError
from cgd_jax.study_files import Study, load

optuna = pytest.importorskip("optuna")
from cgd_jax.studies import search  # noqa: E402

SPACE = {"optimizer.learning_rate": (1e-3, 1e-1), "model.center": ["none", "mean"]}
STUDY = Study("settings", "configs/glyphs.py", "", {}, (), {}, SPACE, 2)


def test_the_file_that_comes_along():
    found = load("search")
    assert found.space["model.center"] == ["none", "mean", "direction"] and found.trials > 10
    assert not found.variants


def test_without_validation_classes_nothing_is_trained(tiny_config, tmp_path):
    with pytest.raises(
        ConfigError, match="A search chooses on validation classes, and the config has none"
    ):
        search.run_search(STUDY, tiny_config, str(tmp_path / "search"))
    assert not (tmp_path / "search").exists()


@pytest.fixture
def validating(tiny_config, monkeypatch):
    """A config with validation classes, and the images that are measured meanwhile."""
    tiny_config.data.validation_fraction = 0.34
    tiny_config.train.eval_every = 4
    measured, embed = set(), evaluate.embed_dataset

    def watched(embed_images, dataset, *arguments):
        measured.update(dataset.query.ids)
        return embed(embed_images, dataset, *arguments)

    monkeypatch.setattr(evaluate, "embed_dataset", watched)
    return tiny_config, measured


@pytest.mark.slow
def test_a_search_never_sees_the_test_classes_and_goes_on(validating, tmp_path, capsys):
    config, measured = validating
    search.run_search(STUDY, config, str(tmp_path))
    dataset, validation, _ = open_data(config)
    assert measured == set(validation.query.ids) and not measured & set(dataset.query.ids)
    said = capsys.readouterr().out
    assert "Best of 2 trials, R@1 " in said and "--optimizer.learning_rate=" in said
    for name in search.PLOTS:
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    assert len([*tmp_path.glob("trial-*/history.csv")]) == 2
    assert not [*tmp_path.glob("trial-*/checkpoints")]
    measured.clear()
    search.run_search(STUDY, config, str(tmp_path))
    assert not measured, "all trials are finished"
    search.run_search(STUDY._replace(trials=3), config, str(tmp_path))
    assert len([*tmp_path.glob("trial-*/history.csv")]) == 3


class Trial:
    """Stands for one of Optuna's."""

    def __init__(self, prune):
        self.reported, self.prune = {}, prune

    def report(self, value, step):
        self.reported[step] = value

    def should_prune(self):
        return self.prune


@pytest.mark.slow
def test_a_trial_is_worth_its_best_step_and_may_be_pruned(validating, tmp_path):
    config, _ = validating
    trial = Trial(prune=False)
    value = search.train_trial(trial, config, {"model.center": "mean"}, tmp_path / "whole")
    assert [*trial.reported] == [4, 8, 12]
    np.testing.assert_allclose(value, max(trial.reported.values()))
    assert config.model.center == "none", "the next trial begins with the same config"
    trial = Trial(prune=True)
    with pytest.raises(optuna.TrialPruned):
        search.train_trial(trial, config, {}, tmp_path / "pruned")
    assert [*trial.reported] == [4] and not (tmp_path / "pruned" / "checkpoints").exists()
