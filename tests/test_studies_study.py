"""Studies: files that are read, and the runs they are made of."""

import json
import runpy
from pathlib import Path

import pytest

from cgd_jax.runtime.errors import ConfigError
from cgd_jax.studies.study import ensembles, plan
from cgd_jax.study_files import FOLDER, Study, load
from configs import glyphs

STUDIES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "search")


def config_of(path):
    return runpy.run_path(path)["get_config"]()


VARIANTS = {"rank": {"loss.classification_weight": 0.0}, "both": {}}
TWO = Study("two", "configs/glyphs.py", "both", VARIANTS, (0, 1))


@pytest.mark.parametrize("name", STUDIES)
def test_studies_that_come_along_can_be_run(name, tmp_path):
    loaded = load(name)
    runs = plan(loaded, config_of(loaded.config), {}, str(tmp_path))
    assert len(runs) == len(loaded.variants) * len(loaded.seeds) and len(loaded.seeds) >= 3
    assert Path(loaded.config).exists()


def test_the_papers_descriptor_sets():
    sets = set(load("descriptors").variants)
    assert sets - {"R"} == set("S M G SM MS SG GS MG GM SMG MSG GSM".split())


def test_plan(tmp_path):
    config = glyphs.get_config()
    runs = plan(TWO, config, {}, str(tmp_path))
    assert [run.name() for run in runs] == [
        "rank, seed 0", "both, seed 0", "rank, seed 1", "both, seed 1",
    ]  # fmt: skip
    assert [run.folder.name for run in runs[:2]] == [
        "loss.classification_weight=0.0,seed=0",
        "seed=0",
    ]
    assert runs[2].config.loss.classification_weight == 0 and runs[2].config.seed == 1
    assert runs[1].config.train.eval_every == config.train.steps, (
        "nothing is chosen on test classes"
    )
    assert config.loss.classification_weight == 0.1 and config.seed == 0, "the base is as it was"
    some = plan(TWO, config, {}, str(tmp_path), ["both"], [7])
    assert [run.folder.name for run in some] == ["seed=7"]


def test_steps_between_are_evaluated_if_something_follows_from_them(tmp_path):
    config = glyphs.get_config()
    config.data.validation_fraction = 0.2
    assert plan(TWO, config, {}, str(tmp_path))[0].config.train.eval_every == 500
    config = glyphs.get_config()
    config.train.update(eval_every=50, best_of_test=True)
    (run, *_) = plan(TWO, config, {"train.eval_every": 50}, str(tmp_path))
    assert run.config.train.eval_every == 50 and not run.config.train.best_of_test


def test_a_value_may_follow_from_the_config(tmp_path):
    long = {"long": {"train.steps": lambda steps: 2 * steps}}
    study = TWO._replace(variants=TWO.variants | long)
    (run,) = [r for r in plan(study, glyphs.get_config(), {}, str(tmp_path), seeds=[3])][2:]
    assert run.config.train.steps == run.config.train.eval_every == 2000
    assert run.folder.name == "train.steps=2000,seed=3"
    config = glyphs.get_config()
    config.train.steps = 30
    *_, run = plan(study, config, {"train.steps": 30}, str(tmp_path))
    assert run.config.train.steps == 60, "it may be given, and is the value that others follow from"


def test_members_of_ensembles(tmp_path):
    study = TWO._replace(together={"a/b": ("rank", "both")}, reference="a/b, PCA")
    runs = plan(study, glyphs.get_config(), {}, str(tmp_path))
    found = ensembles(study, runs, str(tmp_path))
    assert [[run.name() for run in members] for _, members, _ in found] == [
        ["rank, seed 0", "both, seed 0"],
        ["rank, seed 1", "both, seed 1"],
    ]
    assert found[1][2] == tmp_path / "together,a_b,seed=1.json"
    assert ensembles(TWO, runs, str(tmp_path)) == []
    with pytest.raises(ConfigError, match="compares them with rank, both, which cannot be left"):
        plan(study, glyphs.get_config(), {}, str(tmp_path), ["both"])
    some = plan(TWO, glyphs.get_config(), {}, str(tmp_path), ["both"])
    assert ensembles(study, some, str(tmp_path)) == [], "a member was left out"


def test_studies_share_runs(tmp_path):
    folders = [
        {run.folder for run in plan(load(name), glyphs.get_config(), {}, str(tmp_path))}
        for name in ("descriptors", "losses", "auxiliary", "combination")
    ]
    assert len(set.intersection(*folders)) == 3, "the reference of all of them"


@pytest.mark.parametrize(
    "variants,given,chosen,message",
    [
        (
            {"x": {"loss.nothing": 1}},
            {},
            None,
            "two, variant x: the config has no key loss.nothing",
        ),
        ({"x": {"loss.temperature": 0.0}}, {}, None, r"two, variant x: loss\.temperature=0\.0"),
        ({"x": {"train.steps": "many"}}, {}, None, "two, variant x: .*steps"),
        ({"x": {"loss.classification_weight": 0.1}}, {}, None, "are the same experiment"),
        ({}, {"seed": 1}, None, "--config.seed was given, but it is what two varies"),
        ({}, {"loss.classification_weight": 1}, None, "is what two varies"),
        ({}, {}, ["rank"], "compares them with both, which cannot be left out"),
        ({}, {}, ["both", "other"], "--variants=both,other: two has rank, both"),
        ({}, {}, ["both", "both"], "both, seed 0 and both, seed 0.* are the same experiment"),
    ],
)
def test_mistakes_are_found_before_anything_runs(tmp_path, variants, given, chosen, message):
    bad = TWO._replace(variants=TWO.variants | variants)
    with pytest.raises(ConfigError, match=message):
        plan(bad, glyphs.get_config(), given, str(tmp_path), chosen)


NAMES = "CONFIG, SEEDS, VARIANTS, REFERENCE"


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "KeyError: 'CONFIG'.*It needs CONFIG"),
        ("1 +", "SyntaxError"),
        (
            f"{NAMES} = 'glyphs', (0,), {{'a': {{}}}}, 'b'",
            r"names \['b'\], VARIANTS \['a'\]",
        ),
        (f"{NAMES} = 'glyphs', (), {{'a': {{}}}}, 'a'", "those of SEEDS, at least one"),
        (f"{NAMES} = 'other', (0,), {{'a': {{}}}}, 'a'", "there is no config 'other'"),
        (f"{NAMES} = 'glyphs', (0,), {{'a': {{'seed': 1}}}}, 'a'", "those of SEEDS, at"),
    ],
)
def test_files_that_are_no_studies(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(str(path))


def test_a_folder_with_another_run_is_refused(tmp_path):
    folder = tmp_path / "seed=0"
    folder.mkdir()
    values = json.loads(glyphs.get_config().to_json())
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="train.eval_every: 500 → 1000"):
        plan(TWO, glyphs.get_config(), {}, str(tmp_path))


def test_long_values_make_folders_of_their_own(tmp_path):
    weights = {name: {"model.pretrained": f"/weights/{'ä' * 300}/{name}.pth"} for name in "ab"}
    runs = plan(TWO._replace(variants=weights | TWO.variants), glyphs.get_config(), {}, "w")
    for run in runs:
        (tmp_path / run.folder).mkdir(parents=True)
    assert len({run.folder for run in runs}) == len(runs) == 8


def test_a_study_that_is_not_there():
    with pytest.raises(ConfigError, match="--study=other: there is no such .*descriptors"):
        load("other")
