"""Reports of studies: what they say of the runs is computed from their values, which are kept."""

import csv
import json
import re

import pytest
from matplotlib.text import Text

from cgd_jax.runtime.errors import InputError
from cgd_jax.studies.report import compare_again, read_values, write_report
from cgd_jax.studies.study import ensembles, plan
from configs import glyphs
from tests.test_studies_study import TWO

UNSEEN = {"tested": 40, "trained on": 0}
SEEN = {"tested": 40, "trained on": 3}


@pytest.fixture(autouse=True)
def only_figures_that_are_looked_at(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("cgd_jax.studies.report.plot", lambda *arguments: None)


def report(folder, study=TWO, seeds=(0, 1), classes=(UNSEEN,), options=(), **more):
    """The report of a study whose runs have these results; `classes` is of each seed or of all."""
    runs = plan(study, glyphs.get_config(), {}, str(folder), seeds=list(seeds))
    for i, run in enumerate(runs):
        run.folder.mkdir(parents=True)
        metrics = {"recall@1": 0.5 + 0.01 * i, "map@r": 0.25}
        metrics["confidence"] = {"recall@1": [0.4, 0.6]}
        result = {
            "step": 1000,
            "metrics": metrics,
            "geometry": {"mean_embedding_norm": 0.1 * (i + 1)},
            "costs": {"parameters": 1000 + i, "embed_seconds": 2.0},
            "classes": classes[run.seed % len(classes)],
            "with options": {name: metrics for name in options},
            **more,
        }
        (run.folder / "results.json").write_text(json.dumps(result))
        # 500 steps of 64 images at 64 images/s, 500 at 128, and an evaluation between.
        history = "step,images_per_second,recall@1\n500,64,\n700,,0.5\n1000,128,\n"
        (run.folder / "history.csv").write_text(history)
    for _, _, path in ensembles(study, runs, str(folder)):
        joined = {
            "recall@1": 0.9,
            "map@r": 0.8,
            "dimension": 504,
            "parameters": 1,
            "embed_seconds": 9,
        }
        parts = {"one": {}, "other": {}, "together": joined, "PCA": joined | {"dimension": 252}}
        path.write_text(json.dumps(parts))
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
    assert said.removesuffix(".") in text
    assert "Measured after 1,000 steps, chosen by: last step." in text and "Seeds 0, 1;" in text


def test_values_are_kept_and_give_the_report_again(tmp_path):
    folder = tmp_path / "glyphs_gpu"
    text = report(folder, options=["first_descriptor"])
    with open(folder / "two.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2
    assert {key: rows[0][key] for key in ("study", "setting", "dataset", "reference")} == {
        "study": "two",
        "setting": "glyphs_gpu",
        "dataset": "glyphs",
        "reference": "both",
    }
    first, second = rows[:2]
    assert first["variant"] == "rank" and first["seed"] == "0" and first["step"] == "1000"
    assert (first["vector"], second["vector"]) == ("embedding", "first_descriptor")
    assert first["recall@1"] == second["recall@1"] == "0.5" and first["map@r"] == "0.25"
    assert first["mean_embedding_norm"] == "0.1" and second["mean_embedding_norm"] == ""
    assert first["training_seconds"] == "750.0"
    assert first["dimension"] == "252" and "confidence" not in first
    assert (first["recall@1_low"], first["recall@1_high"]) == ("0.4", "0.6")
    (folder / "two.md").unlink()
    compare_again([str(folder / "two.csv")])
    assert (folder / "two.md").read_text() == text
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
    assert "all variants have: 1. Fewer" in report(tmp_path / "1", seeds=(7,))
    assert "all variants have: 2. Fewer" in report(tmp_path / "2")
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


def test_runs_that_are_measured_together(tmp_path):
    variants = {"S": {"model.descriptors": "S"}, "G": {"model.descriptors": "G"}, "SG": {}}
    study = TWO._replace(variants=variants, reference="SG", together={"S + G": ("S", "G")})
    report(tmp_path, study, seeds=(4,))
    rows = {row["variant"]: row for row in read_values(tmp_path / "two.csv")}
    assert list(rows) == [
        "S",
        "G",
        "SG",
        *(f"S + G, {k}" for k in ("separated", "concatenated", "PCA")),
    ]
    *_, apart, together, reduced = rows.values()
    assert float(apart["recall@1"]) == pytest.approx(0.505) and float(apart["dimension"]) == 252
    assert (together["recall@1"], together["dimension"], reduced["dimension"]) == (
        "0.9",
        "504",
        "252",
    )
    assert together["parameters"] == reduced["parameters"] == "2001", "the sum of both"
    assert (together["embed_seconds"], together["training_seconds"]) == ("4.0", "1500.0")
    assert apart["training_seconds"] == "750.0"


def test_a_step_that_validation_classes_chose_beside_the_last_one(tmp_path):
    last = {"step": 2000, "metrics": {"recall@1": 0.1, "map@r": 0.05}}
    more = {"chosen by": "validation classes", "last step": last}
    text = report(tmp_path, **more)
    assert "Measured after 1,000 steps, chosen by: validation classes." in text
    chosen, at_end = text.split("## Vector: last step")
    assert "51.00 ± 12.71" in chosen and "10.00 ± 0.00" in at_end
    del more["last step"]  # where it is the chosen one
    text = report(tmp_path / "other", **more)
    assert "51.00 ± 12.71" in text.split("## Vector: last step")[1]


def test_verdicts_over_settings(tmp_path, capsys):
    files = []
    for setting in ("cars", "birds", "glyphs"):
        report(tmp_path / setting)
        files.append(str(tmp_path / setting / "two.csv"))
    compare_again(files)
    text = (tmp_path / "cars" / "verdicts.md").read_text()
    assert re.search(r"two: rank − both +\| +3 \| +-1.00 ± 0.00 \| +10.00 \|.* behind \|", text)
    assert (
        "alone would have 0.05 of 1 intervals exclude zero" in text
        and "Settings: cars, birds, glyphs." in text
    )
    assert "two: rank − both" in capsys.readouterr().out
    path = tmp_path / "old.csv"
    path.write_text("vector,metric,variant,seeds,mean\nembedding,recall@1,S,3,0.5\n")
    with pytest.raises(
        InputError, match="it lacks study, setting, reference, seed, step, recall@1"
    ):
        compare_again([str(path)])
    path.write_text("")
    with pytest.raises(InputError, match="it lacks study"):
        compare_again([str(path)])


def test_steps_to_a_recall(tmp_path):
    """Those of the highest level that all runs with a curve reach."""
    study = TWO._replace(together={"two": ("rank", "both")})
    text = report(tmp_path, study, seeds=(0, 1, 2))
    assert "steps to" not in text, "they were evaluated once"
    curves = {"rank": ".1 .3 .6 .55", "both": ".35 .4 .41 .5"}
    for run in plan(study, glyphs.get_config(), {}, str(tmp_path), seeds=[0, 1, 2]):
        recalls = curves[run.variant].split()
        rows = [f"{100 * (i + 1 + run.seed)},64,{recall}" for i, recall in enumerate(recalls)]
        (run.folder / "history.csv").write_text(
            "\n".join(["step,images_per_second,recall@1", *rows])
        )
    runs = plan(study, glyphs.get_config(), {}, str(tmp_path), seeds=[0, 1, 2])
    shown = write_report(study, runs, str(tmp_path))
    assert re.search(r"steps to 50 %", shown)
    rank, both = (
        row
        for row in read_values(tmp_path / "two.csv")
        if row["seed"] == "0" and row["evaluations"]
    )
    assert (rank["steps_to_60"], both["steps_to_60"]) == ("300", "")
    assert (rank["steps_to_30"], both["steps_to_30"], both["steps_to_50"]) == ("200", "100", "400")
    assert "400 ± 248" in shown and "500 ± 248" in shown
