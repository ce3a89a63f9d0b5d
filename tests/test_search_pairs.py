"""Pairs and vectors, read as the documentation of hloc and kapture says that they lie."""

import numpy as np
import pytest

import cgd_jax
from cgd_jax.search.pairs import write_pairs
from tests.search_samples import photograph, write_network
from tests.test_main import run_here


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Of phones, in folders, some of them seen twice; and a network."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(7):
        photograph(root / f"images/database/{i // 3}/{i}.jpg", i, (64, 48 + 10 * i))
    for i in range(3):
        photograph(root / f"images/queries/q{i}.png", 2 * i, (64, 48 + 20 * i))
    write_network(root / "model")
    return root


def read_pairs(path):
    """As hloc's parsers.parse_retrieval does: lines that are split at white space."""
    pairs = [line.split() for line in path.read_text().split("\n") if line]
    assert all(len(pair) == 2 for pair in pairs)
    return pairs


def similarities(root, names):
    files = [root / "images" / name for name in names]
    vectors = cgd_jax.open(root / "model", aspect="keep").embed(files)
    return dict(zip(names, vectors, strict=True))


def test_pairs_are_the_nearest_of_the_database(photos, tmp_path):
    status, output, errors = run_here(
        *("pairs", f"{photos}/images/queries", f"{photos}/images/database", "--k=4"),
        *(f"--model={photos}/model", "--aspect=keep", f"--out={tmp_path}/pairs.txt"),
    )
    assert (status, errors) == (0, "")
    assert f"4 of 7 images for each of 3, by their paths below {photos}/images." in output
    pairs = read_pairs(tmp_path / "pairs.txt")
    database = [f"database/{i // 3}/{i}.jpg" for i in range(7)]
    queries = [f"queries/q{i}.png" for i in range(3)]
    vectors = similarities(photos, [*database, *queries])
    expected = []
    for query in queries:
        ranked = sorted(database, key=lambda name: -(vectors[name] @ vectors[query]))
        expected += [[query, name] for name in ranked[:4]]
    assert pairs == expected
    assert [pair[1] for pair in pairs[::4]] == [database[0], database[2], database[4]]


def test_a_folder_is_paired_with_itself(photos, tmp_path):
    folder, out = photos / "images/database", tmp_path / "pairs.txt"
    write_pairs(folder, folder, cgd_jax.open(photos / "model"), 50, out)
    pairs = read_pairs(out)
    assert len(pairs) == 7 * 6 and all(query != other for query, other in pairs)
    assert {name for pair in pairs for name in pair} == {f"{i // 3}/{i}.jpg" for i in range(7)}


def test_fewer_images_than_are_asked_for(photos, tmp_path):
    """All of them; a database may hold the queries, which then do not find themselves."""
    images, out = photos / "images", tmp_path / "pairs.txt"
    for database, found in ((images / "database", 7), (images, 9)):
        write_pairs(images / "queries", database, cgd_jax.open(photos / "model"), 50, out)
        pairs = read_pairs(out)
        assert len(pairs) == len(set(map(tuple, pairs))) == 3 * found
        assert all(query != other for query, other in pairs)


def test_the_file_of_hloc(photos, tmp_path):
    """Datasets below groups: hloc takes the name of a dataset's group for that of the image."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    folders, network = (photos / "images/queries", photos / "images/database"), photos / "model"
    out, features = tmp_path / "pairs.txt", tmp_path / "global.h5"
    write_pairs(*folders, cgd_jax.open(network, aspect="keep"), 2, out, features)
    names = []

    def visit(_, item):
        if isinstance(item, h5py.Dataset):
            names.append(item.parent.name.strip("/"))

    with h5py.File(features, "r", libver="latest") as file:
        file.visititems(visit)
        stored = {name: file[name]["global_descriptor"].__array__() for name in names}
    assert {vector.dtype for vector in stored.values()} == {np.dtype("float32")}
    expected = similarities(photos, sorted(names))
    assert len(names) == 10 and {name for pair in read_pairs(out) for name in pair} <= {*names}
    for name, vector in stored.items():
        np.testing.assert_allclose(vector, expected[name], atol=1e-6)


def test_the_folder_of_kapture(photos, tmp_path):
    """`name, dtype, dsize, metric_type`, and per image its numbers without a header."""
    folders, network = (photos / "images/queries", photos / "images/database"), photos / "model"
    opened = cgd_jax.open(network, aspect="keep")
    write_pairs(*folders, opened, 2, tmp_path / "pairs.txt", tmp_path / "kapture")
    folder = tmp_path / "kapture/reconstruction/global_features/cgd_jax"
    lines = (folder / "global_features.txt").read_text().splitlines()
    (row,) = [line.split(", ") for line in lines if not line.startswith("#")]
    assert lines[0] == "# kapture format: 1.1"
    assert row == ["cgd_jax", "float32", str(opened.dimension), "L2"]
    names = [p.relative_to(folder).as_posix()[:-6] for p in sorted(folder.rglob("*.gfeat"))]
    expected = similarities(photos, names)
    assert len(names) == 10
    for name in names:
        vector = np.fromfile(folder / f"{name}.gfeat", np.dtype(row[1]))
        np.testing.assert_allclose(vector, expected[name], atol=1e-6)


def test_what_cannot_be_paired(photos, tmp_path):
    folder, model = tmp_path / "some", f"--model={photos}/model"
    photograph(folder / "a.jpg", 0)
    pairs = ("pairs", str(folder), str(folder), model, f"--out={tmp_path}/pairs.txt")
    for arguments, message in (
        (("pairs",), "give two folders of images"),
        (("pairs", str(folder), "/nowhere", model), "/nowhere: there is no such folder of images."),
        ((*pairs, "--scales=1,x"), "--scales=1,x: give numbers"),
        ((*pairs, "--scales=1,-2"), "scales=(1.0, -2.0): give 1 to 8 factors up to 4"),
        (pairs, "hold no two images that can be read"),
    ):
        status, _, errors = run_here(*arguments)
        assert status and message in errors
    (folder / "b.jpg").write_bytes(b"no image")
    photograph(folder / "c.jpg", 1)
    status, output, errors = run_here(*pairs)
    assert status == 0 and "b.jpg: not an image" in output + errors
    assert len(read_pairs(tmp_path / "pairs.txt")) == 2
    photograph(folder / "my photo.jpg", 2)
    status, _, errors = run_here(*pairs)
    assert status and "my photo.jpg has a space in its name, at which hloc would split" in errors
