"""What pip installs."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def test_base_and_train_are_the_complete_set():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    complete = [line.partition("#")[0].strip() for line in lines]
    complete = sorted(str(Requirement(line)) for line in complete if line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = project["dependencies"] + project["optional-dependencies"]["train"]
    assert sorted(str(Requirement(line)) for line in installed) == complete
