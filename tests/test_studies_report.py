"""Reports of studies: what they say of the runs is computed from their values, which are kept."""

import csv
import json

import pytest
from matplotlib.text import Text

from cgd_jax.studies.report import report_text, write_report
from cgd_jax.studies.study import plan
from configs import glyphs
from tests.test_studies_study import TWO

UNSEEN = {"tested": 40, "trained on": 0}
SEEN = {"tested": 40, "trained on": 3}


def report(folder, study=TWO, seeds=(0, 1), classes=(UNSEEN,), options=()):
    """The report of a study whose runs have these results; `classes` is of each seed or of all."""
    runs = plan(study, glyphs.get_config(), {}, str(folder), seeds=list(seeds))
    for i, run in enumerate(runs):
        run.folder.mkdir(parents=True)
        metrics = {"recall@1": 0.5 + 0.01 * i, "map@r": 0.25, "confidence": {"map@r": [0.2, 0.3]}}
        result = {
            "step": 1000,
            "metrics": metrics,
            "geometry": {"mean_embedding_norm": 0.1 * (i + 1)},
            "classes": classes[run.seed % len(classes)],
            "with options": {name: metrics for name in options},
        }
        (run.folder / "results.json").write_text(json.dumps(result))
        # 500 steps of 64 images at 64 images/s, 500 at 128, and an evaluation between.
        history = "step,images_per_second,recall@1\n500,64,\n700,,0.5\n1000,128,\n"
        (run.folder / "history.csv").write_text(history)
    shown = write_report(study, runs, str(folder))
    assert max(map(len, shown.splitlines())) <= 80, "the terminal"
    return (folder / f"{study.name}.md").read_text()


@pytest.mark.parametrize(
    "classes,said",
    [
        ([UNSEEN], "Per cent, on classes never seen in training."),
        ([SEEN], "Per cent, on classes, 3 of 40 seen in training."),
        ([UNSEEN, SEEN], "on classes never seen in training; classes, 3 of 40 seen in training."),
    ],
)
def test_which_classes_were_measured(tmp_path, classes, said):
    text = report(tmp_path, classes=classes)
    assert said in text and "1,000 steps, seeds 0, 1; 4 of 4 runs are finished." in text


def test_values_are_kept_and_give_the_report_again(tmp_path):
    text = report(tmp_path, options=["first_descriptor"])
    with open(tmp_path / "two.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2
    first, second = rows[:2]
    assert first["variant"] == "rank" and first["seed"] == "0" and first["step"] == "1000"
    assert (first["vector"], second["vector"]) == ("embedding", "first_descriptor")
    assert first["recall@1"] == second["recall@1"] == "0.5" and first["map@r"] == "0.25"
    assert first["mean_embedding_norm"] == "0.1" and second["mean_embedding_norm"] == ""
    assert first["training_seconds"] == "750.0"
    assert first["dimension"] == "252" and "confidence" not in first
    runs = plan(TWO, glyphs.get_config(), {}, str(tmp_path))
    assert report_text(TWO, runs, rows) == text
    embedding, other = text.split("## Vector: first_descriptor")
    assert "mean norm" in embedding and "0.200 |" in embedding and "0.300 |" in embedding
    assert "mean norm" not in other
    # R@1 of the variants is 50, 52 and 51, 53.
    assert "| rank |       2 | 51.00 ± 12.71 | -1.00 ± 0.00 * |" in embedding


@pytest.mark.parametrize("others,said", [([], "0.05 of the 1 here"), ([0.2, 0.3], "0.15 of the 3")])
def test_what_chance_would_star(tmp_path, others, said):
    variants = TWO.variants | {f"smoothing {x}": {"loss.smoothing": x} for x in others}
    assert f"chance alone would star {said}" in report(tmp_path, TWO._replace(variants=variants))


def test_few_seeds(tmp_path):
    assert "with 1 seed." in report(tmp_path / "1", seeds=(7,))
    assert "with 2 seeds." in report(tmp_path / "2")
    assert "Warning" not in report(tmp_path / "3", seeds=(1, 2, 3))


def test_names_in_a_report(tmp_path, drawn):
    names = ["a|b", "two\nlines", "$\\frac$ _x_", "猫 🦄 <b>"]
    variants = {name: {"loss.smoothing": i / 9} for i, name in enumerate(names)}
    text = report(tmp_path, TWO._replace(variants=variants, reference="a|b", name="a_*"))
    assert text.startswith("# a\\_\\*, glyphs\n")
    for shown in (r"| a\|b ", r"| two\\nlines ", r"| \$\\frac\$ \_x\_ ", r"| 猫 🦄 \<b\> "):
        assert shown in text
    texts = {found.get_text() for found in drawn[0].findobj(Text)}
    assert {"a|b", r"two\nlines", "$\\frac$ _x_", "猫 🦄 <b>"} <= texts
    assert "a_*, glyphs, 1,000 steps" in texts and (tmp_path / "a_*.png").exists()
