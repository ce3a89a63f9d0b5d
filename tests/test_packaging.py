"""What pip installs, and what is said where something is missing."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cgd_jax import __main__ as cli
from cgd_jax.runtime import packages
from tests.search_samples import folder_of_photographs, write_network

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PYPROJECT["project"]["optional-dependencies"]


def requirements_of(extra):
    """Everything that an extra brings, by name."""
    found = {}
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.name == "cgd_jax":
            for included in requirement.extras:
                found |= requirements_of(included)
        else:
            found[requirement.name.lower()] = requirement
    return found


def test_base_and_train_are_the_complete_set():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    complete = [line.partition("#")[0].strip() for line in lines]
    complete = sorted(str(Requirement(line)) for line in complete if line)
    installed = [Requirement(line) for line in PYPROJECT["project"]["dependencies"]]
    assert sorted(map(str, [*installed, *requirements_of("train").values()])) == complete


def test_what_is_tested_is_pinned():
    """Actions by commit, packages by hash; every one that the clone asks for is among them."""
    for workflow in (ROOT / ".github/workflows").glob("*.yml"):
        used = re.findall(r"uses: *(\S+)", workflow.read_text(encoding="utf-8"))
        assert used and [u for u in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", u)] == []
    lock = (ROOT / ".ci/requirements.lock").read_text(encoding="utf-8").replace("\\\n", "")
    lines = [line for line in lock.splitlines() if line and not line.startswith("#")]
    assert all(re.match(r"[\w.-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", line) for line in lines)
    pinned = {line.partition("==")[0] for line in lines}
    text = "".join((ROOT / f"requirements{of}.txt").read_text() for of in ("", "-dev"))
    wanted = re.findall(r"^[a-z0-9][\w.-]*", text, re.MULTILINE | re.IGNORECASE)
    assert {name.lower().replace("_", "-") for name in wanted} <= pinned


def test_all_is_all_and_an_extra_says_the_same_as_another():
    stated = {}
    for requirement in (r for extra in EXTRAS for r in requirements_of(extra).values()):
        assert stated.setdefault(requirement.name, requirement) == requirement
    assert requirements_of("all").keys() == {name.lower() for name in stated}


def test_whoever_opens_a_network_keeps_its_programs():
    """JAX bounds its cache only where filelock is installed, and warns at every program if not."""
    assert {"platformdirs", "filelock"} <= requirements_of("models").keys()


def test_every_package_of_the_clone_is_installed():
    listed = set(PYPROJECT["tool"]["setuptools"]["packages"])
    folders = {path.parent for path in (ROOT / "cgd_jax").rglob("*.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert listed == found | {"cgd_jax.configs", "cgd_jax.configs.studies"}


def test_every_command_says_which_extra_it_needs():
    assert {command.extra for command in cli.COMMANDS.values()} <= EXTRAS.keys()


def test_a_package_that_is_missing():
    packages.require("This", "train", "jax", "numpy")
    with pytest.raises(ModuleNotFoundError) as caught:
        packages.require("This", "train", "jax", "no_such_package", "neither")
    assert str(caught.value).startswith("This needs the package no_such_package, which is not")
    assert "pip install 'cgd_jax[train]'" in str(caught.value)


def test_modes_and_modules_say_what_they_lack():
    """As somebody sees it who installed JAX, NumPy and SciPy only."""
    code = """
import importlib.util
find_spec, absent = importlib.util.find_spec, ("flax", "pyarrow", "absl")
importlib.util.find_spec = lambda name: None if name in absent else find_spec(name)
for name in ("cgd_jax.models", "cgd_jax.search"):
    try: __import__(name)
    except ModuleNotFoundError as error: print(error)
from cgd_jax.__main__ import main
main()
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    models, search = run.stdout.splitlines()
    assert "cgd_jax.models needs the package flax" in models and "cgd_jax[models]" in models
    assert "cgd_jax.search needs the package pyarrow" in search and "cgd_jax[search]" in search
    assert run.returncode == 1 and "jax" not in run.stderr.partition("cgd_jax[")[0]
    assert run.stderr.startswith("error: The command line needs the package absl")


@pytest.mark.slow
def test_serve_explains_without_the_packages_that_train(tmp_path):
    """What `serve` brings is enough for what `/about` offers: nothing draws, trains, reads TFDS."""
    brought_by_train = requirements_of("train").keys() - requirements_of("serve").keys()
    assert {"tensorflow-datasets", "orbax-checkpoint", "optax"} <= brought_by_train
    write_network(tmp_path / "network")
    photos = folder_of_photographs(tmp_path / "photos", 4)
    code = f"""
import sys
absent = ("tensorflow_datasets", "orbax", "optax", "array_record", "tensorboardX", "matplotlib")
sys.modules |= dict.fromkeys(absent)  # to import them is a ModuleNotFoundError
from fastapi.testclient import TestClient
from cgd_jax.search import Index, filling
from cgd_jax.serve.app import create_app
import tests.tiny  # the backbone of the network
filling.update({str(tmp_path / "index")!r}, [{str(photos)!r}], {str(tmp_path / "network")!r})
index = Index.open({str(tmp_path / "index")!r})
client = TestClient(create_app(index), base_url="http://localhost")
query, match = index.vectors()[0][:2]
answer = client.get("/explanation", params=dict(query=query, match=match))
print(client.get("/about").json()["explains"], answer.status_code)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.split()[-2:] == ["True", "200"], run.stderr
