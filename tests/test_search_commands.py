"""The modes index and search, as they are used, and what they print and draw."""

import contextlib
import json
import os

import numpy as np
import pytest
from PIL import Image

from cgd_jax import __main__ as cli
from cgd_jax import network as networks
from cgd_jax.search import commands, duplicates, queries
from tests.search_samples import folder_of_photographs, photograph, stand_in
from tests.test_main import run_here

pytest.importorskip("lancedb", reason="lancedb is not installed")


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    photos = folder_of_photographs(folder / "photos", 12)
    photograph(photos / "hats/copy.png", 1)
    commands.fill_index(str(folder / "index"), [str(photos)], stand_in())
    return folder


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    """The stand-in is found by its name."""
    monkeypatch.setattr(networks, "open_network", lambda source, vector=None, **seen: stand_in())
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)


def test_index_then_search(filled, tmp_path):
    flags = [f"--index={filled}/index"]
    status, output, errors = run_here("--mode=index", f"--images={filled}/photos", *flags)
    assert (status, errors) == (0, "")
    assert "0 images added, 0 changed, 0 removed, 13 unchanged, 0 files left out" in output
    assert output.count("\n") == 1  # no progress where there is nothing to do
    flags += ["--mode=search", f"--query={filled}/photos/hats/000.png"]
    figure = f"--picture={tmp_path}/found.png"
    status, output, errors = run_here(*flags, "--k=3", "--where=label = 'hats'", figure)
    assert (status, errors) == (0, "")
    rows = [line.split() for line in output.splitlines() if line[:1].isdigit()]
    assert f"\nin {filled}/photos/hats:\n" in output
    assert rows[0] == ["1", "1.0000", "hats", "000.png"]
    assert len(rows) == 3 and {row[2] for row in rows} == {"hats"}
    assert "Searched 7 images by 1 query in" in output and "Look at" in output
    drawn = np.asarray(Image.open(tmp_path / "found.png"))
    assert (drawn != 255).any(2).sum() > 4 * 24 * 16 * 0.9  # the query and three images
    status, output, errors = run_here(*flags, "--json", "--exact", f"--query={filled}/photos/shoes")
    assert (status, errors) == (0, "")
    answer = json.loads(output)
    assert answer["searched"] == 13 and len(answer["answers"]) == 1 + 6
    for found in answer["answers"]:
        # An image and its copy are equally near; which is first does not matter.
        assert found["hits"][0]["rank"] == 1 and found["hits"][0]["similarity"] > 0.9999
        assert [hit["rank"] for hit in found["hits"]] == list(range(1, 14))


def test_duplicates(filled, tmp_path):
    flags = ["--mode=search", "--duplicates", f"--index={filled}/index", "--similarity=0.999"]
    status, output, errors = run_here(*flags, f"--picture={tmp_path}/groups.png")
    assert (status, errors) == (0, "")
    rows = [line.split() for line in output.splitlines() if line[:1].isdigit()]
    assert [row[:3] for row in rows] == [["1", "2", "1.0000"]] * 2
    assert f"else {duplicates.SIMILARITY}." in " ".join(run_here("search", "--help")[1].split())
    assert Image.open(tmp_path / "groups.png").height > 24
    status, output, _ = run_here(*flags, "--json")
    paths = [hit["path"] for hit in json.loads(output)["groups"][0]["images"]]
    assert paths == [f"{filled}/photos/hats/copy.png", f"{filled}/photos/shoes/001.png"]
    status, output, _ = run_here(*flags, "--where=label = 'hats'")
    assert (status, output) == (0, "No two images have a similarity of 0.999 or more.\n")


def test_an_answer_that_nobody_reads_on(filled, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    command = ["main.py", "--mode=search", f"--index={filled}/index", "--duplicates", "--json"]
    with open(writing, "w") as nobody, pytest.raises(SystemExit) as ended:
        with contextlib.redirect_stdout(nobody):
            cli.main(command)
    assert ended.value.code == 1
    assert capfd.readouterr().err == ""


def test_a_part_of_the_query(filled):
    assert queries.parse_crop("1,2,10,20") == (1, 2, 11, 22)
    for text in ("1,2,3", "a,b,c,d", "0,0,0,5", "0,0,nan,5", "0,0,inf,1"):
        with pytest.raises(ValueError, match="--crop=.*give the left and upper edge"):
            queries.parse_crop(text)
    flags = ["--mode=search", f"--index={filled}/index", "--json", "--crop=6,5,12,11"]
    status, output, _ = run_here(*flags, f"--query={filled}/photos/hats/000.png")
    (found,) = json.loads(output)["answers"]
    assert status == 0 and found["hits"][0]["similarity"] < 0.9999


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--mode=index"], "say what to index: --images=IMAGES"),
        (["--mode=index", "--images=a", "--k=3"], "--k goes with `search` and `pairs`, not"),
        (["--mode=search", "--query=a", "--images=a"], "--images goes with `index` and `serve`"),
        (["--mode=search"], "say what to search by, --query=a.jpg, or look for --duplicates."),
        (["--mode=search", "--query=a", "--duplicates"], "or look for --duplicates."),
        (["--mode=search", "--duplicates", "--k=3"], "--crop and --k do not go with --dup"),
        (["--mode=search", "--query=a", "--similarity=1"], "--similarity goes with --duplicates."),
        (["--mode=search", "--duplicates", "--similarity=0", "--index=FILLED"], "above 0 and at"),
        (["--mode=search", "--query=a", "--workdir=a", "--model=b"], "both name a network"),
        (["--mode=search", "--query=a", "--match=b"], "--match goes with `explain`"),
        (["--mode=train", "--images=a"], "--images goes with `index` and `serve`"),
        (["--mode=data", "--config=glyphs", "--index=a"], "--index goes with `index` and `search`"),
        (["--mode=search", "--query=a", "--index=/nowhere"], "/nowhere: there is no index. Make"),
        (["--mode=search", "--query=a", "--workdir=/nowhere"], "=/nowhere/index: there is no inde"),
        (["--mode=index", "--images=/nowhere", "--index=IDX"], "/nowhere: there is no such fold"),
        (["--mode=search", "--query=none.jpg", "--index=FILLED"], "none.jpg: there is no such f"),
        (["--mode=search", "--query=README.md", "--index=FILLED"], "no image to search by. RE"),
        (["--mode=search", "--query=docs/glyphs_curves.png", "--index=FILLED", "--where=a = 1"],
         "--where='a = 1' is not understood"),
    ],
)  # fmt: skip
def test_mistakes_are_answered_in_one_line(arguments, message, filled, tmp_path):
    places = {"FILLED": f"{filled}/index", "IDX": f"{tmp_path}/index"}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    status, output, errors = run_here(*arguments)
    assert status == 1 and output == ""
    assert message in errors and errors.startswith("error: ")
    assert len(errors.strip().splitlines()) == 1


@pytest.mark.parametrize("asked", [["--duplicates"], ["--query=PHOTO"]])
def test_a_picture_that_cannot_be_written_costs_no_answer(asked, filled, tmp_path):
    (tmp_path / "file").write_text("")
    asked = [flag.replace("PHOTO", f"{filled}/photos/hats/000.png") for flag in asked]
    flags = ["search", f"--index={filled}/index", f"--picture={tmp_path}/file/a.png"]
    status, output, errors = run_here(*flags, *asked)
    assert status == 1 and "copy.png" in output
    assert f"--picture={tmp_path}/file/a.png cannot be written" in errors
    assert "incomplete." not in errors and len(errors.strip().splitlines()) == 1
