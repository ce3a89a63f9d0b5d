"""What a data set holds: the same pictures, what changed, whether there is anything to find."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgd_jax import data, metrics
from cgd_jax.data import Dataset, Split
from cgd_jax.data.dataset import listed, printable


def split_of(labels, contents=None, names=None, first=0):
    labels = np.asarray(labels, np.int64)
    class_names = names or {label: f"class {label}" for label in labels.tolist()}
    ids = [f"{first + i}.jpg" for i in range(len(labels))]
    contents = None if contents is None else np.asarray(contents, np.int64)
    return Split(np.zeros((len(labels), 1, 1, 3), np.uint8), labels, ids, class_names, 0, contents)


TRAIN = split_of([0, 0, 1, 1, 2], [1, 2, 3, 4, 5])


def test_a_query_is_the_row_of_the_gallery_with_the_same_picture():
    query = split_of([7, 7, 8], [50, -2, 50])
    gallery = split_of([7, 8, 8, 8, 8], [9, 50, 11, 9, 50])
    dataset = Dataset(TRAIN, query, gallery)
    assert dataset.own_rows().tolist() == [1, -1, 1]
    assert dataset._replace(gallery=None).own_rows().tolist() == [0, 1, 2]
    for other in (split_of([1]), split_of([7], [49]), split_of([7], [51])):
        assert Dataset(TRAIN, other, gallery).own_rows() is None


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_noise_scores_at_chance_where_queries_are_in_the_gallery(seed, shuffled_names):
    # Every query is a gallery picture too, as in a CSV that lists photographs twice.
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(20), 10)
    vectors = rng.normal(size=(200, 8)).astype(np.float32)
    order = rng.permutation(200) if shuffled_names else np.arange(200)
    query = split_of(labels, np.arange(200) * 7 - 500)
    gallery = split_of(labels[order], query.contents[order])
    dataset = Dataset(TRAIN, query, gallery)
    recall = metrics.recall_at_k(
        vectors, labels, vectors[order], labels[order], (1,),
        query_ids=dataset.own_rows(), gallery_ids=np.arange(200),
    )[1]  # fmt: skip
    chance = 9 / 199
    assert abs(recall - chance) < 5 * np.sqrt(chance * (1 - chance) / 200)


def test_queries_that_find_nothing_are_an_error():
    good = split_of([3, 3, 4], [1, 2, 3])
    data.check_queries(Dataset(TRAIN, good, None))
    data.check_queries(Dataset(TRAIN, split_of([3, 5]), split_of([3, 4])))
    with pytest.raises(ValueError, match="None of the 3 test classes has a second image"):
        data.check_queries(Dataset(TRAIN, split_of([3, 4, 5]), None))
    with pytest.raises(ValueError, match="None of the 0 test classes"):
        data.check_queries(Dataset(TRAIN, split_of([]), None))
    with pytest.raises(ValueError, match="queries are class 3, class 4, the gallery is class 5"):
        data.check_queries(Dataset(TRAIN, split_of([3, 4]), split_of([5, 5])))
    with pytest.raises(ValueError, match="the queries themselves"):
        data.check_queries(Dataset(TRAIN, good, split_of([4], [3])))


DATASET = Dataset(TRAIN, split_of([3, 3, 4, 4], [6, 7, 8, 9], first=5), None)


def test_the_fingerprint_is_small_and_survives_json():
    found = data.fingerprint(DATASET)
    assert json.loads(json.dumps(found)) == found
    assert found["train"]["per class"] == [["class 0", 2], ["class 1", 2], ["class 2", 1]]
    assert found["query"]["images"] == 4 and found["query"]["classes"] == 2
    assert "gallery" not in found and "per class" not in found["query"]
    assert data.describe_difference(found, found) == []
    assert data.fingerprint(DATASET._replace(query=DATASET.query._replace(skipped=3))) == found


def changed(split="train", **parts):
    part = getattr(DATASET, split)
    return DATASET._replace(**{split: part._replace(**parts)})


SWAPPED = {0: "class 1", 1: "class 0", 2: "class 2"}
RENAMED = {0: "class 0", 1: "other", 2: "class 2"}


@pytest.mark.parametrize(
    "other, expected",
    [
        (
            changed(class_names=RENAMED),
            ["classes that are gone (1): class 1", "classes that are new (1): other"],
        ),
        (
            DATASET._replace(train=split_of([0, 0, 1, 2], [1, 2, 3, 5])),
            [
                "classes with another number of images (1): class 1",
                "5 images then, 4 now",
            ],
        ),
        (
            DATASET._replace(train=split_of([0, 0, 1, 1, 2, 5], range(6))),
            ["classes that are new (1): class 5", "3 classes then, 4 now", "5 images then, 6 now"],
        ),
        (changed(contents=np.array([1, 2, 3, 4, 6])), ["other images under the same names"]),
        (changed(ids=["5.jpg", *TRAIN.ids[1:]]), ["other names"]),
        (
            changed(labels=np.array([1, 1, 0, 0, 2]), class_names=SWAPPED),
            ["numbered otherwise"],
        ),
    ],
)  # fmt: skip
def test_differences_are_named(other, expected):
    lines = data.describe_difference(data.fingerprint(DATASET), data.fingerprint(other))
    assert len(lines) == len(expected)
    for line, text in zip(lines, expected, strict=True):
        assert line.startswith("train: ") and text in line


def test_differences_of_test_splits():
    old = data.fingerprint(DATASET)
    gallery = data.fingerprint(DATASET._replace(gallery=split_of([3])))
    assert data.describe_difference(old, gallery) == ["gallery: there was none"]
    assert data.describe_difference(gallery, old) == ["gallery: there is none now"]
    other = data.fingerprint(changed("query", contents=np.arange(4)))
    assert data.describe_difference(old, other) == [
        "query: there are other images under the same names"
    ]
    # One side of a version that did not know the contents.
    unknown = data.fingerprint(changed("query", contents=None))
    assert data.describe_difference(unknown, old) == []


def test_names_in_messages():
    assert listed(["a", 1], 2) == "a, 1" and listed("abcdef") == "a, b, c, d, e, …"
    assert printable("a\nb\tc\u2028\x7f") == r"a\nb\tc\u2028\x7f"
    for name in ("äöü Ä", "👩‍🚀", "日本", r"$x_1^2$ [a] *", "\u00a0"):
        assert printable(name) == name


@pytest.mark.parametrize("name", [name for name in data.NAMES if name != "blobs"])
def test_a_data_set_says_what_it_takes_of_the_config(name):
    keys = data.config_keys(name)
    assert data.needs_source(name) == (name not in ("glyphs", "facades")) == ("source" in keys)
    assert ("nested_classes" in keys) == (name == "image_folder")
