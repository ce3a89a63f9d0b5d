"""Maps: axes as NumPy finds them, thumbnails where their points lie, files that can be read."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cgd_jax.data import Dataset, Split
from cgd_jax.evaluate import Embeddings
from cgd_jax.reports import projection


def split_of(labels, first=0, size=8):
    """Every image has a gray of its own: its number, from `first`, times 2."""
    labels = np.asarray(labels)
    grays = 2 * (first + np.arange(len(labels)))
    images = np.broadcast_to(grays[:, None, None, None], (len(labels), size, size, 3))
    names = {label: f"class\t{label}" for label in labels.tolist()}
    ids = [f"image {first + i}" for i in range(len(labels))]
    return Split(images.astype(np.uint8), labels, ids, names)


def rgb(color):
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


@pytest.mark.parametrize("shape", [(50, 7), (6, 20)])
def test_pca_is_that_of_numpy(shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * np.linspace(3, 1, shape[1]) + 5
    points, shares = projection.pca(x.astype(np.float32))
    centerd = x - x.mean(0)
    left, values, _ = np.linalg.svd(centerd, full_matrices=False)
    expected = left[:, :2] * values[:2]
    signs = np.sign(np.sum(expected * points, 0))
    np.testing.assert_allclose(points, expected * signs, atol=1e-4)
    np.testing.assert_allclose(shares, values[:2] ** 2 / np.sum(centerd**2), rtol=1e-4)
    np.testing.assert_allclose(np.cov(points.T)[0, 1], 0, atol=1e-4)


def test_signs_of_pca_follow_from_the_data():
    x = np.random.default_rng(1).normal(size=(30, 4)) * [1, 5, 2, 1]
    points, _ = projection.pca(x)
    assert np.corrcoef(points[:, 0], x[:, 1])[0, 1] > 0.9
    np.testing.assert_allclose(projection.pca(-x)[0], -points, atol=1e-9)
    np.testing.assert_allclose(projection.pca(x[::-1])[0], points[::-1], atol=1e-9)


def test_pca_of_a_collapsed_model():
    points, shares = projection.pca(np.ones((5, 3), np.float32))
    assert not points.any() and not shares.any()
    assert projection.corners(points, 100, 60, 10).tolist() == [[45, 25]] * 5


def test_umap_gets_the_vectors(monkeypatch):
    """As its documentation has it; the library itself is not needed here."""

    def umap(n_neighbors, *, metric, random_state, n_jobs):
        assert (n_neighbors, metric, random_state, n_jobs) == (4, "cosine", 3, 1)
        return SimpleNamespace(fit_transform=lambda x: x[:, :2])

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=umap))
    x = np.random.default_rng(0).normal(size=(5, 3))
    points, caption = projection.project(x, "umap", 3)
    np.testing.assert_array_equal(points, x[:, :2])
    assert "UMAP" in caption


def test_corners_fill_the_canvas_at_one_scale():
    points = np.array([[0.0, 0], [4, 0], [0, 1], [2, 0.5]])
    found = projection.corners(points, 410, 1000, 10)
    np.testing.assert_array_equal(found, [[0, 545], [400, 545], [0, 445], [200, 495]])
    np.testing.assert_array_equal(projection.corners(7e3 * points - 3, 410, 1000, 10), found)


def test_squares_that_are_drawn_do_not_overlap_and_no_other_fits():
    places = np.random.default_rng(0).integers(0, 100, (200, 2))
    free = projection.without_overlap(places, 9)
    apart = np.abs(places[:, None] - places).max(-1) >= 9
    for i in range(200):
        before = free & (np.arange(200) < i)
        assert free[i] == apart[i, before].all()
    assert 10 < free.sum() < 150


def test_classes_with_most_images_get_the_colours_and_the_first_places():
    labels = np.concatenate([np.repeat(np.arange(40), 2), np.repeat([50, 51], 15)])
    coloured = projection.coloured_classes(labels, 0)
    assert len(coloured) == len(projection.COLORS) and {50, 51} < set(coloured)
    assert projection.coloured_classes(labels[:8], 0).tolist() == [0, 1, 2, 3]
    order = projection.drawing_order(labels, coloured, 0)
    assert sorted(order) == list(range(len(labels)))
    first = labels[order[: 10 + 10 + 2 * (len(coloured) - 2)]]
    assert set(first) == set(coloured) and np.sum(first == 50) == 10


def test_a_sample_is_aligned_with_queries_and_gallery():
    dataset = Dataset(None, split_of(np.arange(30) % 7), split_of(np.arange(50) % 7, 30))
    vectors = np.arange(80, dtype=np.float32)[:, None] * [1, 2]
    everything = Embeddings(vectors[:30], vectors[30:])
    for most in (20, 100):
        sample = projection.sample_test(everything, dataset, 0, most)
        assert len(sample.labels) == min(most, 80) and sample.total == 80
        assert {name for name, _ in sample.places} == {"query", "gallery"}
        for vector, label, (name, i) in zip(*sample[:3], strict=True):
            assert vector[0] == i + 30 * (name == "gallery") and label == i % 7
    again = projection.sample_test(everything, dataset, 0, 20)
    other = projection.sample_test(everything, dataset, 1, 20)
    assert again.places == projection.sample_test(everything, dataset, 0, 20).places != other.places
    alone = projection.sample_test(
        Embeddings(vectors[:30], None), dataset._replace(gallery=None), 0
    )
    assert alone.places == [("query", i) for i in range(30)]


def test_thumbnails_lie_where_their_points_are(tmp_path):
    dataset = Dataset(None, split_of([5, 5, 6, 6, 6]), None)
    points = np.array([[0.0, 0], [10, 0], [0, 4], [10, 4], [10, 4]])  # the last two are one
    sample = projection.sample_test(Embeddings(points.astype(np.float32), None), dataset, 0)
    path = tmp_path / "embeddings.png"
    drawn = projection.draw_map(path, points, sample, dataset, "title", 0, size=(400, 300))
    assert drawn.tolist()[:3] == [True] * 3 and sorted(drawn.tolist()[3:]) == [False, True]
    side = 40 + 6  # 8 pixels five times, and the frame
    tall = round((400 - side) * 0.4) + side
    picture = np.asarray(Image.open(path))
    heading = len(picture) - tall - 20
    assert heading == 90 + 28 + 20
    bottom, right = heading + tall - side, 20 + 400 - side
    for i, (x, y) in enumerate([(20, bottom), (right, bottom), (20, heading)]):
        assert np.all(picture[y + 3 : y + 43, x + 3 : x + 43] == 2 * i)
        frame = rgb(projection.COLORS[0 if i < 2 else 1])
        assert picture[y, x].tolist() == picture[y + side - 1, x + side - 1].tolist() == frame
        assert (y + side == len(picture) - 20) == (i < 2)
    shown = 2 * np.flatnonzero(drawn)[-1]
    assert np.all(picture[heading + 3 : heading + 43, right + 3 : right + 42] == shown)
    assert [p.name for p in tmp_path.iterdir()] == ["embeddings.png"]


def test_images_without_room_are_dots_in_the_colour_of_their_class(tmp_path):
    dataset = Dataset(None, split_of([1] * 60, size=64), None)  # larger than a thumbnail
    points = np.random.default_rng(0).uniform(size=(60, 2))
    points[:2] = [[0, 0], [1, 1]]
    sample = projection.sample_test(Embeddings(points, None), dataset, 0)
    path = tmp_path / "map.png"
    drawn = projection.draw_map(path, points, sample, dataset, "", 0, (200, 200))
    assert 2 < drawn.sum() <= 16
    picture = np.asarray(Image.open(path)).astype(int)
    assert picture.shape[1] == 240
    blue = np.abs(picture[140:] - rgb(projection.COLORS[0])).sum(-1) == 0
    frames = drawn.sum() * (50**2 - 44**2)
    assert frames < blue.sum() < frames + 25 * (~drawn).sum()


@pytest.mark.parametrize(
    "most,drawn,coloured,text",
    [
        (99, 80, 7, "80 test images; the colours are classes:"),
        (99, 60, 7, "80 test images; 60 of them have room, the others are dots; the colours are "),
        (20, 20, 5, "20 of 80 test images, drawn at random; the colours are 5 of 6 classes:"),
    ],
)
def test_a_map_says_what_it_shows(most, drawn, coloured, text):
    labels = np.arange(80) % 7
    embeddings = Embeddings(np.zeros((80, 2), np.float32), None)
    sample = projection.sample_test(embeddings, Dataset(None, split_of(labels), None), 0, most)
    assert text in projection._subtitle(sample, drawn, coloured)


def test_odd_names_in_a_map(tmp_path):
    names = {1: "two\nlines", 2: "猫 🦄", 3: "$\\frac$", 4: "x" * 300}
    dataset = Dataset(None, split_of([1, 2, 3, 4])._replace(class_names=names), None)
    sample = projection.sample_test(Embeddings(np.eye(4), None), dataset, 0)
    projection.draw_map(tmp_path / "a.png", np.eye(4)[:, :2], sample, dataset, "a\nb", 0)
    assert Image.open(tmp_path / "a.png").width == 1640
    projection.write_projector(tmp_path, sample, dataset, 'a\n"b"')
    rows = (tmp_path / "projector" / "metadata.tsv").read_text().splitlines()
    assert (
        len(rows) == 5 and rows[1].startswith("two\\nlines\t1\t") and rows[2].startswith("猫 🦄\t")
    )
    config = (tmp_path / "projector_config.pbtxt").read_text()
    assert r'tensor_name: "a\\n\"b\""' in config


def test_files_of_the_projector_can_be_read(tmp_path):
    dataset = Dataset(None, split_of([1, 1, 2]), split_of([2, 3], 3))
    vectors = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    sample = projection.sample_test(Embeddings(vectors[:3], vectors[3:]), dataset, 0)
    for title in ("before", 'a "title"'):  # the second takes the place of the first
        projection.write_projector(tmp_path / "tensorboard", sample, dataset, title)
    folder = tmp_path / "tensorboard"
    lines = [line.strip() for line in (folder / "projector_config.pbtxt").read_text().splitlines()]
    assert lines[:2] == ["embeddings {", r'tensor_name: "a \"title\""']
    values = dict(line.split(": ") for line in lines if ": " in line)
    paths = [values[key].strip('"') for key in ("tensor_path", "metadata_path", "image_path")]
    assert lines.count("single_image_dim: 8") == 2 and lines[-2:] == ["}", "}"]

    np.testing.assert_allclose(np.loadtxt(folder / paths[0]), vectors, rtol=1e-4)
    rows = [line.split("\t") for line in (folder / paths[1]).read_text().splitlines()]
    assert rows[0] == ["class", "label", "id", "split"] and len(rows) == 6
    assert rows[1] == ["class\\t1", "1", "image 0", "query"]
    assert rows[5] == ["class\\t3", "3", "image 4", "gallery"]
    sprite = np.asarray(Image.open(folder / paths[2]))
    assert sprite.shape == (16, 24, 3)  # three in a row
    for i in range(5):
        x, y = i % 3 * 8, i // 3 * 8
        assert np.all(sprite[y : y + 8, x : x + 8] == 2 * i)
    assert np.all(sprite[8:, 16:] == 255)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_sprite_is_as_large_as_tensorboard_shows_it():
    columns = np.ceil(np.sqrt(projection.MOST))
    assert projection.SPRITE // columns >= 64
