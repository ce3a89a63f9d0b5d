"""Maps: axes as NumPy finds them, images where their points lie, files that can be read."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cgd_jax.data import Dataset, Split
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
    points, caption = projection.project(x.astype(np.float32), "pca", 0)
    centered = x - x.mean(0)
    left, values, _ = np.linalg.svd(centered, full_matrices=False)
    expected = left[:, :2] * values[:2]
    signs = np.sign(np.sum(expected * points, 0))
    np.testing.assert_allclose(points, expected * signs, atol=1e-4)
    first, second = values[:2] ** 2 / np.sum(centered**2)
    assert caption == f"PCA, {first:.1%} + {second:.1%} of the variance"


def test_signs_of_pca_follow_from_the_data():
    x = np.random.default_rng(1).normal(size=(30, 4)) * [1, 5, 2, 1]
    points, _ = projection.project(x, "pca", 0)
    assert np.corrcoef(points[:, 0], x[:, 1])[0, 1] > 0.9
    np.testing.assert_allclose(projection.project(-x, "pca", 0)[0], -points, atol=1e-9)
    np.testing.assert_allclose(projection.project(x[::-1], "pca", 0)[0], points[::-1], atol=1e-9)


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


def test_a_sample_is_aligned_with_queries_and_gallery():
    dataset = Dataset(None, split_of(np.arange(30) % 7), split_of(np.arange(50) % 7, 30))
    vectors = np.arange(80, dtype=np.float32)[:, None] * [1, 2]
    everything = (vectors[:30], vectors[30:])
    for most in (20, 100):
        sample = projection.sample_test(everything, dataset, 0, most)
        assert len(sample.rows) == min(most, 80) and sample.total == 80
        assert {row["split"] for row in sample.rows} == {"query", "gallery"}
        for vector, row, (images, i) in zip(*sample[:3], strict=True):
            number = i + 30 * (row["split"] == "gallery")
            assert vector[0] == number and row["label"] == i % 7
            assert np.all(images[i] == 2 * number) and row["id"] == f"image {number}"
    again = projection.sample_test(everything, dataset, 0, 20)
    other = projection.sample_test(everything, dataset, 1, 20)
    assert again.rows == projection.sample_test(everything, dataset, 0, 20).rows != other.rows
    alone = projection.sample_test((vectors[:30], None), dataset._replace(gallery=None), 0)
    assert [row["id"] for row in alone.rows] == [f"image {i}" for i in range(30)]


def cells_of(path):
    """The cells of a map: (column, row) → color of the frame, gray of the image; and its legend."""
    map_, side = np.asarray(Image.open(path).convert("RGB"))[160:], 54
    found = {}
    for row in range(len(map_) // side):
        for column in range(map_.shape[1] // side):
            cell = map_[row * side : (row + 1) * side, column * side : (column + 1) * side]
            frame, image = cell[0, 0].tolist(), cell[3:-3, 3:-3]
            if frame != [255, 255, 255]:
                assert len({*image.flat}) == 1 and np.all(cell[-1, -1] == frame)
                found[column, row] = frame, int(image[0, 0, 0])
    return found


def draw(path, points, labels, seed=0, **names):
    points = np.asarray(points, np.float64)
    dataset = Dataset(None, split_of(labels)._replace(**names), None)
    sample = projection.sample_test((points, None), dataset, 0)
    projection.draw_map(path, points, sample, "a $title$\n", seed)


def test_images_lie_where_their_points_are(tmp_path):
    points = [[0, 0], [10, 0], [0, 4], [10, 4], [10, 4]]  # the last two are one
    draw(tmp_path / "a.png", points, [5, 5, 6, 6, 6])
    blue, orange = map(rgb, projection.COLORS[:2])
    found = cells_of(tmp_path / "a.png")
    low, high = (20 - 1) / 2 + 29 * 0.2, (20 - 1) / 2 - 29 * 0.2  # rows, at the scale of columns
    low, high = round(low), round(high)
    last = found.pop((29, high))
    assert last in [(blue, 6), (blue, 8)]
    # The class with more images has the first color.
    assert found == {(0, low): (orange, 0), (29, low): (orange, 2), (0, high): (blue, 4)}
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("points", [np.zeros((5, 2)), np.full((5, 2), 7e3)])
def test_a_map_of_a_collapsed_network(tmp_path, points):
    draw(tmp_path / "a.png", points, [1] * 5)
    assert len(cells_of(tmp_path / "a.png")) == 1


def test_classes_with_most_images_get_the_colors_and_precedence(tmp_path, drawn):
    labels = np.concatenate([np.repeat(np.arange(40), 2), np.repeat([50, 51], 15)])
    points = np.random.default_rng(0).normal(size=(len(labels), 2)).round()
    points[-30:] = points[:30]
    names = {label: f"class {label}" for label in labels.tolist()}
    draw(tmp_path / "a.png", points, labels, class_names=names)
    (legend,) = drawn[0].legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert len(texts) == len(projection.COLORS) and texts[:2] == ["class 50", "class 51"]
    title, said = legend.get_title().get_text().rsplit("\n", 1)
    found = cells_of(tmp_path / "a.png")
    assert title == "a $title$\\n"
    assert said == (
        f"{len(found)} of 110 test images, of those in one place one; the colors are 9 of 42 "
        f"classes:"
    )
    assert len(found) == len({tuple(point) for point in points.tolist()})
    colored = [gray // 2 for frame, gray in found.values() if frame == rgb(projection.COLORS[0])]
    assert colored and all(labels[i] == 50 for i in colored)
    of_two = {tuple(point) for point in points[-30:].tolist()}
    first = [rgb(color) for color in projection.COLORS]
    assert sum(frame in first for frame, _ in found.values()) >= len(of_two)


def test_odd_names_in_a_map(tmp_path, drawn):
    names = {1: "two\nlines", 2: "猫 🦄", 3: "$\\frac$", 4: "x" * 300}
    draw(tmp_path / "a.png", np.eye(4)[:, :2], [1, 2, 3, 4], class_names=names)
    texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert texts == [r"two\nlines", "猫 🦄", "$\\frac$", "x" * 39 + "…"]
    dataset = Dataset(None, split_of([1, 2, 3, 4])._replace(class_names=names), None)
    sample = projection.sample_test((np.eye(4), None), dataset, 0)
    projection.write_projector(tmp_path, sample, 'a\n"b"')
    rows = (tmp_path / "projector" / "metadata.tsv").read_text().splitlines()
    assert len(rows) == 5 and rows[1].startswith("two\\nlines\t1\t")
    assert rows[2].startswith("猫 🦄\t")
    config = (tmp_path / "projector_config.pbtxt").read_text()
    assert r'tensor_name: "a\\n\"b\""' in config


def test_files_of_the_projector_can_be_read(tmp_path):
    dataset = Dataset(None, split_of([1, 1, 2]), split_of([2, 3], 3))
    vectors = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    sample = projection.sample_test((vectors[:3], vectors[3:]), dataset, 0)
    for title in ("before", 'a "title"'):  # the second takes the place of the first
        projection.write_projector(tmp_path / "tensorboard", sample, title)
    folder = tmp_path / "tensorboard"
    lines = [line.strip() for line in (folder / "projector_config.pbtxt").read_text().splitlines()]
    assert lines[:2] == ["embeddings {", r'tensor_name: "a \"title\""']
    values = dict(line.split(": ") for line in lines if ": " in line)
    paths = [values[key].strip('"') for key in ("tensor_path", "metadata_path", "image_path")]
    assert lines.count("single_image_dim: 48") == 2 and lines[-2:] == ["}", "}"]

    np.testing.assert_allclose(np.loadtxt(folder / paths[0]), vectors, rtol=1e-4)
    rows = [line.split("\t") for line in (folder / paths[1]).read_text().splitlines()]
    assert rows[0] == ["class", "label", "id", "split"] and len(rows) == 6
    assert rows[1] == ["class\\t1", "1", "image 0", "query"]
    assert rows[5] == ["class\\t3", "3", "image 4", "gallery"]
    sprite = np.asarray(Image.open(folder / paths[2]))
    assert sprite.shape == (96, 144, 3)  # three in a row
    for i in range(5):
        x, y = i % 3 * 48, i // 3 * 48
        assert np.all(sprite[y : y + 48, x : x + 48] == 2 * i)
    assert np.all(sprite[48:, 96:] == 255)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_sprite_is_as_large_as_tensorboard_shows_it():
    columns = np.ceil(np.sqrt(projection.MOST))
    assert columns * projection.SIDE <= 8192
