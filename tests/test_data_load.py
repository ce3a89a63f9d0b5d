"""From a config to an open data set: copies of pictures, folders that cannot be written, names."""

import logging

import numpy as np
import pytest

from cgd_jax import data, metrics
from cgd_jax.data import builder_class
from cgd_jax.data.load import load_dataset
from cgd_jax.inspect_data import show_data
from cgd_jax.runtime.errors import ConfigError
from configs import base, image_folder
from tests.dataset_samples import picture, write


@pytest.fixture
def config(tmp_path):
    """The data part of a config for photographs in tmp_path/in."""
    config = image_folder.get_config().data
    config.source, config.dir = str(tmp_path / "in"), str(tmp_path / "data")
    config.resize, config.image_size = 16, 12
    return config


def write_list(root, rows):
    """Writes a CSV of (path, label, split) and returns its path."""
    lines = [",".join(map(str, row)) for row in [("path", "label", "split"), *rows]]
    return str(write(root, {"list.csv": "\n".join(lines)}) / "list.csv")


def photographs(root, classes, each):
    names = [(f"{c}/{i}.jpg", c) for c in classes for i in range(each)]
    write(root, {name: picture(seed) for seed, (name, _) in enumerate(names)})
    return names


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_no_query_finds_itself_in_the_gallery(config, tmp_path, caplog, cache):
    names = photographs(tmp_path / "in", "abcd", 6)
    rows = [(*name, "train") for name in names[:6]]
    rows += [(*name, split) for name in names[6:] for split in ("query", "gallery")]
    # And under other names: once more in the gallery, twice there, and under another label.
    more = [("copies/b.jpg", "b", 6), ("copies/c1.jpg", "c", 12), ("copies/c2.jpg", "d", 12)]
    write(tmp_path / "in", {name: picture(seed) for name, _, seed in more})
    rows += [(name, label, "gallery") for name, label, _ in more]
    config.source, config.cache = write_list(tmp_path / "in", rows), cache
    dataset = load_dataset(config)
    assert len(dataset.query.labels) == 18 and len(dataset.gallery.labels) == 18
    assert "21 of 21 images of the gallery are queries too" in caplog.text
    order = dataset.own_rows()
    assert sorted(order) == list(range(18))
    vectors = dataset.query.images[np.arange(18)].reshape(18, -1).astype(np.float32)
    gallery = dataset.gallery.images[np.arange(18)].reshape(18, -1).astype(np.float32)
    # Every query's nearest neighbour would be its own picture.
    np.testing.assert_array_equal(gallery[order], vectors)
    cosine = vectors @ gallery.T / np.linalg.norm(vectors, axis=1)[:, None]
    cosine /= np.linalg.norm(gallery, axis=1)
    cosine[np.arange(18), order] = -1
    expected = np.mean(dataset.gallery.labels[cosine.argmax(1)] == dataset.query.labels)
    found = metrics.recall_at_k(
        vectors, dataset.query.labels, gallery, dataset.gallery.labels, (1,),
        query_ids=order, gallery_ids=np.arange(18),
    )  # fmt: skip
    assert found[1] == pytest.approx(expected) and expected < 1


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_queries_that_search_each_other_do_not_find_their_copies(config, tmp_path, caplog, cache):
    names = photographs(tmp_path / "in", "abcd", 4)
    rows = [(*name, "train") for name in names[:8]] + [(*name, "test") for name in names[8:]]
    more = [("copies/1.jpg", "c", 8), ("copies/2.jpg", "c", 8), ("copies/3.jpg", "d", 8)]
    write(tmp_path / "in", {name: picture(seed) for name, _, seed in more})
    rows += [(name, label, "test") for name, label, _ in more]
    config.source, config.cache = write_list(tmp_path / "in", rows), cache
    dataset = load_dataset(config)
    # The copy under another label stays, as a neighbour that is wrong.
    kept = sorted([name for name, _ in names[8:]] + ["copies/3.jpg"])
    assert dataset.query.ids == kept and dataset.gallery is None
    assert (
        "2 of 11 test images are copies of others of their class, and are left out" in caplog.text
    )
    images = dataset.query.images
    assert len(images) == 9 == len(dataset.query.contents) and images.shape == (9, 12, 12, 3)
    np.testing.assert_array_equal(images[np.array([4])], images[np.array([0])])
    np.testing.assert_array_equal(images[:9], images[np.arange(9)])


def test_published_sets_keep_their_copies(config, tmp_path, caplog, monkeypatch):
    names = photographs(tmp_path / "in", "abcd", 4)
    write(tmp_path / "in", {"c/copy.jpg": picture(8)})
    rows = [(*name, "train") for name in names[:8]] + [(*name, "test") for name in names[8:]]
    config.source = write_list(tmp_path / "in", [*rows, ("c/copy.jpg", "c", "test")])
    monkeypatch.setattr(builder_class("image_folder"), "PUBLISHED", {"test": (2, 9)})
    assert len(load_dataset(config).query.labels) == 9
    assert "1 of 9 test images are copies of others of their class, and find" in caplog.text


def test_test_pictures_that_were_trained_on_are_reported(config, tmp_path, caplog):
    photographs(tmp_path / "in" / "train", "ab", 3)
    photographs(tmp_path / "in" / "test", "cd", 2)
    load_dataset(config)
    assert "4 of 4 test images are in the training set too: c/0.jpg" not in caplog.text
    assert "4 of 4 test images are in the training set too: test/c/0.jpg" in caplog.text


def test_classes_that_change_what_the_numbers_mean_are_reported(config, tmp_path, caplog):
    photographs(tmp_path / "in" / "train", "abc", 2)
    photographs(tmp_path / "in" / "test", "bcde", 2)
    (tmp_path / "in" / "test" / "d" / "1.jpg").unlink()
    (tmp_path / "in" / "train" / "a" / "1.jpg").unlink()
    load_dataset(config)
    for _ in range(2):  # in every run
        assert "1 of 4 test classes have no second image to find" in caplog.text
        assert "2 of 4 test classes are trained on too: they are not unseen: b, c" in caplog.text
        assert "1 of 3 training classes have a single image, which is repeated" in caplog.text
        caplog.clear()
        load_dataset(config)
    (tmp_path / "in" / "test").rename(tmp_path / "in" / "query")
    photographs(tmp_path / "in" / "gallery", "cd", 1)
    caplog.clear()
    load_dataset(config)
    assert (
        "2 of 4 test classes have no second image" in caplog.text and "at all: b, e" in caplog.text
    )


def test_nothing_to_find_is_one_error(config, tmp_path):
    photographs(tmp_path / "in" / "train", "ab", 3)
    photographs(tmp_path / "in" / "test", "cd", 1)
    with pytest.raises(ValueError, match="None of the 2 test classes has a second image"):
        load_dataset(config)


def test_it_is_said_what_was_understood(config, tmp_path, caplog):
    photographs(tmp_path / "in" / "train", "ab", 3)
    photographs(tmp_path / "in" / "test", [f"class {i}" for i in range(9)], 2)
    with caplog.at_level(logging.INFO):
        load_dataset(config)
    assert "image_folder trains on 2 classes: a, b" in caplog.text
    assert "tests on 9 classes: class 0, class 1, class 2, class 3, class 4, …" in caplog.text


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_folder_that_cannot_be_written_is_named(config, tmp_path, below):
    photographs(tmp_path / "in", "abcd", 2)
    (tmp_path / "file").write_text("")
    config.dir = str(tmp_path / "file" / below)
    with pytest.raises(OSError, match=r"cannot be built in .*file.*--config.data.dir=FOLDER"):
        load_dataset(config)


def test_a_working_folder_that_cannot_be_written_is_refused_before_data_is_shown(tmp_path, capsys):
    config = base.get_config()
    (tmp_path / "file").write_text("")
    config.data.dir = str(tmp_path / "data")
    with pytest.raises(ConfigError, match="--workdir=.*file is a file, not a folder"):
        show_data(config, str(tmp_path / "file" / "run"))
    assert not (tmp_path / "data").exists() and not capsys.readouterr().out


def test_a_folder_whose_name_is_no_unicode_is_refused(config, tmp_path):
    photographs(tmp_path / "in", "abcd", 2)
    config.dir = str(tmp_path / "data\udcff")
    with pytest.raises(ValueError, match=r"data\\udcff.* not valid UTF-8"):
        load_dataset(config)


def test_control_characters_in_names_are_escaped(config, tmp_path):
    rows = [
        ("a\n1.jpg", '"one\nline"'),
        ("a\t2.jpg", '"one\nline"'),
        ("b.jpg", "b"),
        ("c.jpg", "b"),
    ]
    write(tmp_path / "in", {name: picture(i) for i, (name, _) in enumerate(rows)})
    text = "".join(f'"{name}",{label}\n' for name, label in rows)
    config.source = str(write(tmp_path / "in", {"list.csv": "path,label\n" + text}) / "list.csv")
    dataset = load_dataset(config)
    names = {**dataset.train.class_names, **dataset.query.class_names}
    assert set(names.values()) == {r"one\nline", "b"}
    assert {*dataset.train.ids, *dataset.query.ids} >= {r"a\n1.jpg", r"a\t2.jpg"}


def test_the_fingerprint_follows_the_photographs(config, tmp_path):
    photographs(tmp_path / "in" / "train", "ab", 3)
    photographs(tmp_path / "in" / "test", "cd", 2)
    found = data.fingerprint(load_dataset(config))
    config.dir, config.cache = str(tmp_path / "elsewhere"), "none"
    assert data.fingerprint(load_dataset(config)) == found
    (tmp_path / "in" / "train" / "b").rename(tmp_path / "in" / "train" / "bee")
    renamed = data.fingerprint(load_dataset(config))
    assert data.describe_difference(found, renamed) == [
        "train: classes that are gone (1): b",
        "train: classes that are new (1): bee",
    ]
    (tmp_path / "in" / "train" / "bee").rename(tmp_path / "in" / "train" / "b")
    write(tmp_path / "in" / "test", {"c/0.jpg": picture(99)})
    other = data.fingerprint(load_dataset(config))
    assert data.describe_difference(found, other) == [
        "query: there are other images under the same names"
    ]
