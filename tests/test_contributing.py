"""CONTRIBUTING.md is followed to the letter, in a copy of the project.

What its recipes add passes the tests that they add, and is trained, evaluated, explained, exported
and searched with.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.dataset_samples import picture, write

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^ *```(python|diff)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)

# The tests that the recipes name, by what they add.
NAMED = [
    "test_pooling.py::test_kmax_against_numpy",
    "test_pooling.py::test_poolings_ignore_order_and_scale_with_the_features",
    "test_pooling.py::test_gradients_against_finite_differences[K]",
    "test_losses.py::test_ranking_losses_against_loops",
    "test_models_plain.py",
    "test_data_published.py::test_layout[shoes-x.zip]",
    "test_data_published.py::test_published_counts[Shoes]",
    "test_data_published.py::test_a_missing_source_says_what_to_get[Shoes]",
    "test_augment.py::test_grayscale_takes_the_colour_of_some_images",
    "test_augment.py::test_every_option_does_something[option5]",
    "test_metrics.py::test_equals_a_brute_force_loop[CPU-counting-random-itself]",
    "test_search_stores.py::test_rows_come_back_as_they_were[index.sqlite]",
    "test_search_stores.py::test_the_nearest_are_found[index.sqlite]",
    "test_search_stores.py::test_conditions_that_are_none[index.sqlite-labl = 'x']",
    "test_search_stores.py::test_rows_are_replaced_and_deleted[index.sqlite]",
    "test_serve.py::test_answers_name_the_camera",
    "test_doctests.py::test_examples[pooling]",
    "test_doctests.py::test_examples[losses.ranking]",
    "test_doctests.py::test_examples[metrics]",
]

# What somebody does with all of it, in one process; prints how each command ended.
SESSION = """
import json
import numpy as np
from safetensors.numpy import save_file
import cgd_jax
from cgd_jax import __main__ as cli
from cgd_jax.models import pretrained
from cgd_jax.models.plain import PlainNet
from tests.variables import random_variables

NEW = ["--data.source=shoes", "--data.dir=built", "--data.allow_incomplete", "--data.resize=8"]
NEW += ["--data.image_size=8", "--model.backbone=plain", "--model.pretrained=plain.safetensors"]
NEW += ["--model.embedding_dim=8", "--loss.ranking=generalized_lifted", "--augment.grayscale=0.5"]
NEW += ["--train.classes_per_batch=4", "--train.images_per_class=3", "--train.eval_every=2"]
NEW += ["--eval.batch_size=16", "--eval.baselines=false"]
ends = {}

def run(name, *arguments):
    try:
        cli.main(["cgd_jax", *arguments])
        ends[name] = "done"
    except (Exception, SystemExit) as error:
        ends[name] = f"{type(error).__name__}: {error}"

variables = random_variables(PlainNet(), np.zeros((1, 8, 8, 3), np.float32))
save_file(pretrained.to_torchvision(variables, "plain"), "plain.safetensors")
run("train", "train", "--config=shoes:SK", "--workdir=new", "--train.steps=4", *NEW)
run("eval", "eval", "new", "--eval.flip")
run("explain", "explain", "new")
run("export", "export", "new")
if ends["export"] == "done":
    ends["exported"] = cgd_jax.open("new/export").embed(np.zeros((2, 8, 8, 3), "uint8")).shape
run("index", "index", "shoes", "--index=new.sqlite", "--workdir=new")
run("search", "search", "shoes/0_0.jpg", "--index=new.sqlite", "--workdir=new", "--k=3")
run("train without K", "train", "--config=shoes:S", "--workdir=S", "--train.steps=2", *NEW)
run("explain without K", "explain", "S")
print(json.dumps(ends))
"""


def read_recipes():
    """Returns the steps of every recipe: files, each with its blocks of code and their kinds."""
    recipes = {}
    for section in re.split(r"^### Add an? ", PAGE, flags=re.MULTILINE)[1:]:
        title, _, text = section.partition("\n")
        steps = re.split(r"^\d\. \*\*`", text, flags=re.MULTILINE)[1:]
        recipes[title] = [
            (file, [(kind, textwrap.dedent(code)) for kind, code in BLOCK.findall(rest)])
            for file, _, rest in (step.partition("`**") for step in steps)
        ]
    return recipes


RECIPES = read_recipes()


def change(text, diff):
    """Changes lines that occur once, as a block says whose lines begin with a space, + or -."""
    lines = diff.splitlines(keepends=True)
    before = "\n" + "".join(line[1:] for line in lines if line[0] in " -")
    after = "\n" + "".join(line[1:] for line in lines if line[0] in " +")
    assert f"\n{text}".count(before) == 1, f"not once in the file:{before}"
    return f"\n{text}".replace(before, after)[1:]


def follow(root):
    """Does what all recipes say, below a folder."""
    for name, blocks in (step for steps in RECIPES.values() for step in steps):
        file = root / name
        for kind, code in blocks:
            text = file.read_text(encoding="utf-8") if file.exists() else ""
            if kind == "diff":
                text = change(text, code)
            elif text:  # in front of the first function or class
                at = re.search(r"^(@|def |class )", text, re.MULTILINE).start()
                text = f"{text[:at]}{code}\n\n{text[at:]}"
            else:
                text = code
            file.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A copy of the project in which every recipe was followed."""
    root = tmp_path_factory.mktemp("followed")
    for folder in ("cgd_jax", "configs", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    follow(root)
    return root


def run(root, *arguments):
    """Runs Python there; returns what it prints."""
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-8000:]}"
    return done.stdout


def test_every_recipe_touches_four_files_at_most():
    assert list(RECIPES) == [
        "pooling",
        "ranking loss",
        "backbone with weights",
        "data set",
        "augmentation",
        "metric",
        "vector store",
        "field to the search page",
    ]
    for title, steps in RECIPES.items():
        files = [file for file, _ in steps]
        assert len(files) == len(set(files)) <= 4, title
        assert sum(file.startswith("tests/") for file in files) == 1, title


@pytest.mark.slow
def test_the_tests_of_the_recipes_pass(followed):
    files = {Path(file).name for steps in RECIPES.values() for file, _ in steps if "tests/" in file}
    assert files <= {name.partition("::")[0] for name in NAMED}
    run(followed, "-m", "pytest", "-n", "0", *(f"tests/{name}" for name in NAMED))


@pytest.fixture(scope="module")
def ends(followed):
    """How each command of the session ended."""
    names = {f"{label + i}_{n}.jpg" for label in (0, 1000) for i in range(6) for n in range(4)}
    files = {name: picture(seed) for seed, name in enumerate(sorted(names))}
    rows = "\n".join(f"{name} {name.partition('_')[0]}" for name in sorted(names))
    write(followed / "shoes", files | {"images.txt": rows})
    return json.loads(run(followed, "-c", SESSION).splitlines()[-1])


@pytest.mark.slow
def test_training_and_evaluation(followed, ends):
    assert ends["train"] == ends["eval"] == "done"
    result = json.loads((followed / "new/results.json").read_text())
    assert 0 < result["metrics"]["ndcg"] <= 1
    (again,) = followed.glob("new/eval-*.json")
    assert list(json.loads(again.read_text())["with options"]) == ["embedding, flip"]
    config = json.loads((followed / "new/config.json").read_text())
    assert config["loss"]["generalized_lifted"] == {"margin": 0.1}
    assert config["model"]["backbone"] == "plain" and config["augment"]["grayscale"] == 0.5


@pytest.mark.slow
def test_explanation(followed, ends):
    assert ends["train without K"] == ends["explain without K"] == "done"
    assert list(followed.glob("S/explain-*.png"))
    assert re.fullmatch("SystemExit: error: .*there is no map for K.*", ends["explain"])


@pytest.mark.slow
def test_export(followed, ends):
    assert ends["export"] == "done" and ends["exported"] == [2, 8]
    assert "generalized_lifted (weight 1)" in (followed / "new/export/README.md").read_text()


@pytest.mark.slow
def test_search(followed, ends):
    assert ends["index"] == ends["search"] == "done"
    assert (followed / "new.sqlite").is_file()


def test_every_module_is_where_the_page_says():
    block = PAGE.partition("## Where things are")[2].split("```")[1]
    named = re.findall(r"^  (\w[\w, /]*\w|\w+/)(?:\n|  )", block, re.MULTILINE)
    names = {name for line in named for name in re.findall(r"\w+", line)}
    there = {path.stem for path in ROOT.glob("cgd_jax/[!_]*") if path.suffix in ("", ".py")}
    assert there - names == set()
