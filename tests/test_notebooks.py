"""Notebooks are clean, and their installation leaves a runtime whole."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = "https://github.com/OWNER/cgd_jax"


@pytest.fixture(scope="module")
def install():
    spec = importlib.util.spec_from_file_location("install", ROOT / "notebooks" / "install.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_keep_pictures_only_and_name_the_repository(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 500_000
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["execution_count"] is None
            for output in cell["outputs"]:
                assert set(output.get("data", {"text": 0})) == {"image/png"}, cell["source"]
    first = "".join(notebook["cells"][0]["source"])
    assert (
        f"colab.research.google.com/github/OWNER/cgd_jax/blob/main/notebooks/{path.name}" in first
    )
    code = "".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    assert REPOSITORY in code


def test_a_new_jax_brings_the_library_of_its_device(install):
    def wanted(then, now, **others):
        return install.accelerator({"jax": then, **others}, {"jax": now, **others})

    assert wanted("0.7.2", "0.7.2", libtpu="0.0.21") is None  # nothing changed
    assert wanted("0.5.0", "0.7.2", libtpu="0.0.9") == "jax[tpu]==0.7.2"
    assert wanted("0.5.0", "0.7.2", **{"jax-cuda12-plugin": "0.5.0"}) == "jax[cuda12]==0.7.2"
    assert wanted("0.5.0", "0.7.2") is None  # a CPU
    assert install.accelerator({"libtpu": "0.0.9"}, {"jax": "0.7.2", "libtpu": "0.0.9"}) is None


def test_restarts_only_for_what_was_imported_and_replaced(install):
    before, after = {"numpy": "2.0", "pillow": "11"}, {"numpy": "2.1", "pillow": "11", "flax": "1"}
    assert install.outdated(before, after, {"numpy", "pillow", "flax"}) == ["numpy"]
    assert install.outdated(before, after, {"pillow", "flax"}) == []
    assert "pytest" in install.imported() and "pytest" in install.installed()


def test_extras_of_extras_are_asked_for_once(install, tmp_path):
    file = tmp_path / "pyproject.toml"
    file.write_text(
        "[project.optional-dependencies]\n"
        'models = ["flax>=0.11"]\nsearch = ["cgd_jax[models]", "lancedb"]\n'
        'all = ["cgd_jax[models,search]"]\n'
    )
    assert install.requirements(["all"], str(file)) == ["flax>=0.11", "lancedb"]
    with pytest.raises(KeyError, match="nothing"):
        install.requirements(["nothing"], str(file))
