"""Commands of the pages are run, from the pages' own text, with small things in place of large."""

import gc
import itertools
import re
import shlex
import shutil

import jax
import pytest

pytest.importorskip("lancedb", reason="lancedb is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")

from cgd_jax import __main__ as cli  # noqa: E402
from cgd_jax.search import filling  # noqa: E402
from tests.search_samples import photograph, write_network  # noqa: E402
from tests.test_docs import ROOT, TRUE_TODAY, commands  # noqa: E402
from tests.test_main import run_here  # noqa: E402
from tests.test_ways import TINY  # noqa: E402

FOUND = {text for page in TRUE_TODAY for text in commands(page.read_text("utf-8"))}
COMMANDS = sorted(FOUND - set(cli.COMMANDS))  # a mere name is no command

NOT_RUN = {
    "weights would be downloaded": r"=(timm|facebook)/|OWNER/NAME",
    "a data set would be downloaded": r"=(CUB_200|CARS|BIRDS|INSHOP|\S*Products\.zip|GroceryStore)",
    "places would be downloaded": r"=(GSV|GLDV2)|runs/gldv2",
    "several processes, of which each waits for the others": r"--distributed|--coordinator",
    "a service elsewhere": r"train\.tracker=|http://HOST|s3://",
    "a file of one's own": r"--config=\w+\.py",
    "values of studies that were run": r"study\s\S+\.csv",
    "many trainings": r"study search",
}
# What stands in for what the pages speak of, in a folder where the first words lie.
STAND_INS = {
    r"\b(PHOTOS|IMAGES|photos)\b": "images",
    r"\bSTREETS\b": "streets",
    r"\bruns/(x|photos|[smg])(?=\s)": "runs/glyphs",
    r"validation_fraction=0\.2": "validation_fraction=0.34",
    r"--config=(configs/)?(glyphs|cub200|sop|facades)(\.py)?(?=[:\s])": (
        f"--config={ROOT}/tests/tiny.py"
    ),
    r"(train\.steps|train\.eval_every)=\d+": r"\1=4",
    r"memory_from=\d+": "memory_from=2",
    r"--step=\d+": "--step=12",
    r"--whiten=\d+": "--whiten=4 --index=runs/whitened",
    ":SMG": ":SMG --model.embedding_dim=12",
}


@pytest.fixture(scope="module")
def folder(finished_run, tmp_path_factory):
    """Where commands run: a finished run, images, and an index of them by a small network."""
    folder = tmp_path_factory.mktemp("docs")
    for label, i in itertools.product(range(8), range(4)):
        photograph(folder / f"images/class {label}/{i}.png", seed=4 * label + i)
    for i in range(4):
        photograph(folder / "streets" / ("queries", "database")[i % 2] / f"{i}.jpg", i)
    for name in ("a.jpg", "b.jpg", "A.jpg", "B.jpg", "A.png", "B.png"):
        photograph(folder / name, len(name))
    network = str(write_network(folder / "network"))
    filling.update(str(folder / "runs/index"), [str(folder / "images")], network)
    shutil.copytree(finished_run[1], folder / "runs/glyphs")
    run = str(folder / "runs/glyphs")
    filling.update(f"{run}/index", [str(folder / "images")], run)
    shutil.copytree(finished_run[1], folder / "evaluated")
    return folder


@pytest.fixture(autouse=True)
def without_programs_of_other_commands():
    """In one process they would add up to more memory than a machine has."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.mark.slow
@pytest.mark.parametrize("text", COMMANDS)
def test_a_command_of_the_pages(text, folder, finished_run, monkeypatch):
    for reason, pattern in NOT_RUN.items():
        if re.search(pattern, text) and not re.search(r"study(?! search|\s\S+\.csv)|--help", text):
            pytest.skip(reason)
    text = f"{text} "
    if "study" not in text:  # of which the plan is made, with the real config
        for pattern, stand_in in STAND_INS.items():
            text = re.sub(pattern, stand_in, text)
    text = text.replace("STUDY", "descriptors")
    words = shlex.split(text, comments=True)
    named = [word.removeprefix("--mode=") for word in words if word.startswith("--mode=")]
    command = [*named, *(word for word in words[:1] if word in cli.COMMANDS), "train"][0]
    if command == "study":
        words += ["--dry_run"]
    elif "tests/tiny.py" in text:  # as the finished run is, which is what it goes on with
        words += ["--data.dir=" + finished_run[0].data.dir, "--eval.baselines=False"]
        shutil.rmtree(folder / "runs/tiny", ignore_errors=True)
        if command != "train":
            shutil.copytree(folder / "evaluated", folder / "runs/tiny")
    elif command in ("index", "search", "serve", "pairs") and "--workdir" not in text:
        words += ["--model=network"]
    elif "image_folder" in text:
        words += [f"--data.dir={folder}/data", *TINY, "--model.frozen_blocks=1"]
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: None)
    status, output, errors = run_here(*words, folder=folder)
    assert status == 0, errors
    assert output


@pytest.mark.slow
def test_the_page_in_ten_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "b.jpg", "photos/1.jpg", "photos/2.jpg"):
        photograph(tmp_path / name, seed=len(name))
    page = (ROOT / "docs/in_ten_lines.md").read_text(encoding="utf-8")
    names = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], names)
    said = page.split("# [2, ")
    assert names["vectors"].shape == (2, int(said[1].partition("]")[0]))
    maps = names["network"].explain("a.jpg", "b.jpg").maps
    assert f"{maps.shape[1]}, {maps.shape[2]}, {maps.shape[3]}" == said[2].partition("]")[0]
    assert capsys.readouterr().out.count("photos") == 2
