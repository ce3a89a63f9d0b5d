"""Reports of studies: what they say of the runs is computed from the runs."""

import json

import pytest

from cgd_jax.studies.report import write_report
from cgd_jax.studies.study import plan
from configs import glyphs
from tests.test_studies_study import TWO

UNSEEN = {"tested": 40, "trained on": 0}
SEEN = {"tested": 40, "trained on": 3}


def report(folder, study=TWO, seeds=(0, 1), step=1000, classes=UNSEEN):
    """The report of a study whose runs have these results; `classes` is of each seed or of all."""
    runs = plan(study, glyphs.get_config(), {}, str(folder), seeds=list(seeds))
    for i, run in enumerate(runs):
        run.folder.mkdir(parents=True)
        metrics = {"recall@1": 0.5 + 0.01 * i, "map@r": 0.25}
        result = {"step": step, "metrics": metrics, "with options": {}}
        of_run = classes[run.seed] if isinstance(classes, list) else classes
        if of_run:
            result["classes"] = of_run
        (run.folder / "results.json").write_text(json.dumps(result))
    write_report(study, runs, str(folder))
    return (folder / f"{study.name}.md").read_text()


@pytest.mark.parametrize(
    "classes,said",
    [
        (UNSEEN, "Per cent, on classes never seen in training, at step 1,000."),
        (SEEN, "Per cent, on classes, 3 of 40 seen in training, at step 1,000."),
        ([UNSEEN, SEEN], "classes never seen in training; classes, 3 of 40 seen in training, at"),
        (None, "Per cent, at step 1,000."),
        ([UNSEEN, None], "Per cent, at step 1,000."),
    ],
)
def test_which_classes_were_measured(tmp_path, classes, said):
    text = report(tmp_path, classes=classes)
    assert said in text and ("never seen" in text) == ("never seen" in said)


def test_norms_of_the_mean_embedding(tmp_path):
    assert "mean norm" not in report(tmp_path)  # runs of an older version
    runs = plan(TWO, glyphs.get_config(), {}, str(tmp_path), seeds=[0, 1])
    for i, run in enumerate(runs):
        path = run.folder / "results.json"
        result = json.loads(path.read_text())
        result["geometry"] = {"mean_embedding_norm": 0.1 * (i + 1)}
        result["with options"] = {"first_descriptor": result["metrics"]}
        path.write_text(json.dumps(result))
    on_a_terminal = write_report(TWO, runs, str(tmp_path))
    assert "0.200" in on_a_terminal and max(map(len, on_a_terminal.splitlines())) <= 80
    text = (tmp_path / f"{TWO.name}.md").read_text()
    first, second = text.split("## Vector: first_descriptor")
    assert "mean norm" in first and "0.200 |" in first and "0.300 |" in first
    assert "mean norm" not in second


def test_whether_batches_are_the_same(tmp_path):
    assert "the same seed has the same batches." in report(tmp_path / "same")
    variants = {"few": {"train.classes_per_batch": 16}, "both": {}}
    text = report(tmp_path / "other", TWO._replace(variants=variants))
    assert "the same seed has other batches, though, where train.classes_per_batch differ." in text
    assert "the same batches" not in text


def test_what_chance_would_star(tmp_path):
    text = report(tmp_path / "2")
    assert "chance alone would star 0.05 of the 1 here." in text
    variants = TWO.variants | {name: {"loss.smoothing": s} for name, s in [("a", 0.2), ("b", 0.3)]}
    text = report(tmp_path / "4", TWO._replace(variants=variants))
    assert "chance alone would star 0.15 of the 3 here." in text


def test_nothing_is_said_of_intervals_that_are_not_there(tmp_path):
    text = report(tmp_path, seeds=(7,))
    assert "Intervals" not in text and "star" not in text
    assert "Differences are paired" in text and "with 1 seed." in text


def test_names_in_a_report(tmp_path):
    names = ["a|b", "two\nlines", "$\\frac$ _x_", "猫 🦄 <b>"]
    variants = {name: {"loss.smoothing": i / 9} for i, name in enumerate(names)}
    text = report(tmp_path, TWO._replace(variants=variants, reference="a|b", name="a_*"))
    assert text.startswith("# a\\_\\*, glyphs\n")
    for shown in (r"| a\|b ", r"| two\\nlines ", r"| \$\\frac\$ \_x\_ ", r"| 猫 🦄 \<b\> "):
        assert shown in text
    assert (tmp_path / "a_*.png").stat().st_size > 1000
