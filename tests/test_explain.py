"""Pictures of a run's pairs: which are chosen, and what is said where there are none."""

import json
from functools import partial

import numpy as np
import pytest
from PIL import Image

from cgd_jax import explain
from cgd_jax.data import Dataset, Split
from cgd_jax.evaluation import embed
from cgd_jax.runtime.errors import ConfigError, InputError


def dataset_of(query, gallery):
    split = lambda labels: Split(np.zeros((len(labels), 4, 4, 3), np.uint8), labels, [], {})
    query, gallery = (None if x is None else split(np.array(x)) for x in (query, gallery))
    return Dataset(None, query, gallery)


def vectors_at(*degrees):
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def test_wrong_retrievals_come_surest_first_and_no_class_comes_twice():
    query, gallery = vectors_at(0, 40, 80, 81, 120), vectors_at(1, 43, 82, 120.5)
    dataset = dataset_of([0, 1, 2, 2, 5], [0, 7, 3, 9])
    choose = partial(explain.right_and_wrong, embed.Embeddings(query, gallery), dataset)
    right, wrong = choose(3, 0, None)
    assert right.tolist() == [[0, 0]]
    # Off by half a degree, one, two (of a class that was there) and three.
    assert wrong.tolist() == [[4, 3], [3, 2], [1, 1]]
    assert len(choose(1, 0, None)[1]) == 1


def test_queries_that_search_each_other():
    embeddings = embed.Embeddings(vectors_at(0, 1, 50, 53), None)
    right, wrong = explain.right_and_wrong(embeddings, dataset_of([0, 0, 1, 2], None), 4, 0, None)
    assert sorted(right[0].tolist()) == [0, 1] and len(right) == 1
    assert sorted(wrong[0].tolist()) == [2, 3] and len(wrong) == 1


@pytest.fixture
def run(finished_run):
    return finished_run[1]


def titles_of(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


@pytest.mark.slow
def test_pairs_of_a_run(run, drawn):
    pictures = explain.explain_run(str(run))
    assert pictures and set(pictures) <= {run / "explain-right.png", run / "explain-wrong.png"}
    for picture, figure in zip(pictures, drawn, strict=True):
        roles = [title.partition("\n")[0] for title in titles_of(figure)]
        kind = picture.stem.removeprefix("explain-")
        assert picture.is_file() and roles.count(f"{kind} match") == roles.count("query") > 0
        for row in range(roles.count("query")):
            images = [axes.images for axes in figure.axes[5 * row : 5 * row + 4]]
            assert [len(shown) for shown in images] == [1, 2, 1, 2]  # a map over every other
            assert all(np.any(shown[-1].get_array()) for shown in images[1::2])


def test_two_files_of_any_size(run, tmp_path, drawn):
    colors = np.random.default_rng(0).integers(0, 256, (2, 30, 50, 3), dtype=np.uint8)
    for name, image in zip("ab", colors, strict=True):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    a, b = (str(tmp_path / f"{name}.png") for name in "ab")
    assert explain.explain_run(str(run), 12, a, b) == [run / "explain-a-b.png"]
    assert (run / "explain-a-b.png").is_file()
    query, match, similarity, _ = titles_of(drawn[0])
    assert (query, match) == ("query\na.png", "match\nb.png")
    assert similarity.startswith("similarity ")
    odd = [tmp_path / f"{name}.png" for name in ("$\\frac$ [*] 猫\n", "-" + "ä" * 120)]
    for path in odd:
        Image.fromarray(colors[0]).save(path)
    (picture,) = explain.explain_run(str(run), 12, *map(str, odd))
    assert picture.parent == run and picture.name.startswith("explain-$\\frac$ [*] 猫\n--ää")
    assert titles_of(drawn[1])[0] == "query\n$\\frac$ [*] 猫\\n.png"
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 99"):
        explain.explain_run(str(run), 99, a, b)
    with pytest.raises(ValueError, match="go together"):
        explain.explain_run(str(run), match=b)
    with pytest.raises(FileNotFoundError, match="--match=.*c.png: there is no such file"):
        explain.explain_run(str(run), None, a, str(tmp_path / "c.png"))
    (tmp_path / "c.png").write_text("no image")
    with pytest.raises(InputError, match="c.png: not an image"):
        explain.explain_run(str(run), None, a, str(tmp_path / "c.png"))
    with pytest.raises(FileNotFoundError, match="no run in"):
        explain.explain_run(str(tmp_path), None, a, b)


def test_a_network_with_a_descriptor_that_has_no_map(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    config["model"]["descriptors"] = "SC"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="descriptors='SC': there is no map for C"):
        explain.explain_run(str(tmp_path))
