"""An index answers like an exhaustive search with the network that it belongs to, and no other."""

import io

import jax
import numpy as np
import pytest
from PIL import Image

from cgd_jax.search import (
    Index,
    StoreError,
    pictures,
)
from cgd_jax.search import index as indexes
from cgd_jax.search.duplicates import find_duplicates
from tests.search_samples import folder_of_photographs, photograph, stand_in, vectors_of

pytest.importorskip("lancedb", reason="lancedb is not installed")


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """An index of 20 photographs, their files and vectors."""
    folder = tmp_path_factory.mktemp("index")
    files = sorted(folder_of_photographs(folder / "photos", 20).rglob("*.png"))
    index = Index.open(folder / "index", stand_in(), create=True)
    ids = index.add(files, [file.parent.name for file in files])
    assert len(set(ids)) == 20
    return index, files, ids, vectors_of(stand_in(), files)


@pytest.mark.parametrize("exact", [False, True])
def test_hits_are_those_of_an_exhaustive_search(filled, exact, monkeypatch):
    index, files, ids, vectors = filled
    if exact:  # in memory, as on a GPU
        monkeypatch.setattr(index.store, "exact", False)
    for where, chosen in ((None, range(20)), ("label = 'hats'", range(10)), ("size < 0", ())):
        found = index.search_vectors(vectors[:3], 5, where, exact)
        for hits, query in zip(found, vectors[:3], strict=True):
            order = sorted(chosen, key=lambda i: -vectors[i] @ query)[:5]
            assert [(hit.id, hit.path) for hit in hits] == [(ids[i], str(files[i])) for i in order]
            expected = [vectors[i] @ query for i in order]
            np.testing.assert_allclose([hit.similarity for hit in hits], expected, atol=1e-6)


def test_a_query_may_be_a_file_an_image_pixels_or_a_vector(filled):
    index, files, ids, vectors = filled
    image = Image.open(files[4])
    for query in (files[4], str(files[4]), image, np.asarray(image), 3 * vectors[4]):
        hits = index.search(query, 3)
        assert hits[0].id == ids[4] and hits[0].similarity == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(index.embed([image, image]), vectors[[4, 4]], atol=1e-6)
    # A part of a picture is what would be found by the part as a picture of its own.
    box = 6, 5, 18, 16
    expected = index.embed([image.crop(box)])[0]
    for query in (files[4], image, np.asarray(image)):
        np.testing.assert_allclose(index.vector_of(query, box), expected, atol=1e-6)


def test_queries_that_are_none(filled, tmp_path):
    index, *_ = filled
    (tmp_path / "bad.jpg").write_bytes(b"<svg/>")
    with pytest.raises(ValueError, match="bad.jpg: not an image"):
        index.search(tmp_path / "bad.jpg")
    with pytest.raises(FileNotFoundError):
        index.search(tmp_path / "none.jpg")
    with pytest.raises(ValueError, match=r"are \[16\], not \[3\]"):
        index.search(np.ones(3))
    with pytest.raises(ValueError, match="zero, NaN or infinite"):
        index.search(np.full(16, np.nan))
    with pytest.raises(ValueError, match="k must be at least 1"):
        index.search(np.ones(16), 0)
    with pytest.raises(ValueError, match=r"an image is \[H, W, 3\] uint8, not \[4, 4\] float64"):
        index.search(np.zeros((4, 4)))


def test_what_is_known_of_a_picture(filled):
    index, files, ids, vectors = filled
    record = index.get(ids[0])
    assert record._replace(hash="") == (
        *(ids[0], str(files[0]), "hats", files[0].stat().st_size, ""),
        *(24, 16),
    )
    thumbnail = Image.open(io.BytesIO(index.thumbnail(ids[0])))
    assert thumbnail.format == "JPEG" and thumbnail.size == (24, 16)
    pixels = np.asarray(Image.open(files[0]).convert("RGB"), int)
    assert np.abs(np.asarray(thumbnail) - pixels).mean() < 12  # red and blue are where they were
    np.testing.assert_allclose(index.vector(ids[0]), vectors[0], atol=1e-6)
    assert index.get("nobody's") is None
    for method in (index.thumbnail, index.vector):
        with pytest.raises(KeyError, match="no picture '../../etc/passwd'"):
            method("../../etc/passwd")
    assert index.labels() == {"hats": 10, "shoes": 10}
    assert index.count("label = 'shoes' AND width > 20") == 10


def test_vectors_for_other_tools(filled):
    index, _, ids, vectors = filled
    names, found = index.vectors()
    rows = dict(zip(names, found, strict=True))
    assert found.dtype == np.float32 and sorted(names) == sorted(ids)
    np.testing.assert_allclose(np.stack([rows[id] for id in ids]), vectors, atol=1e-6)
    table = index.to_arrow()
    assert table.column_names[:3] == ["id", "path", "label"] and table.num_rows == 20
    np.testing.assert_allclose(np.stack(table["vector"].to_pylist()), found, atol=1e-6)


def test_pictures_come_and_go(tmp_path):
    index = Index.open(tmp_path / "index", stand_in(), create=True)
    assert index.search(np.ones(16)) == [] and index.vectors()[1].shape == (0, 16)
    assert index.add([]) == []
    files = [photograph(tmp_path / f"{i}.png", i) for i in range(3)]
    image = Image.open(files[2])
    ids = index.add([files[0], files[1], image, files[0]], ["a", "b", None, "a"])
    assert index.count() == 3 and ids[0] == ids[3] and index.get(ids[2]).path == ""
    assert index.in_memory(None)[0][0].id in ids
    other = Index.open(tmp_path / "index", stand_in())
    other.remove([ids[1], "nobody's"])
    other.add([files[0]], ["c"])
    assert index.count() == 2 and index.labels() == {"c": 1}
    assert sorted(index.vectors()[0]) == sorted([ids[0], ids[2]])  # nothing old is remembered
    (tmp_path / "bad.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="bad.jpg: empty file"):
        index.add([files[1], tmp_path / "bad.jpg"])
    assert index.count() == 2


def test_another_network_is_refused_with_both_named(filled, tmp_path):
    index, *_ = filled
    address = index.store.address
    with pytest.raises(ValueError, match=r"network stand-in \(weights 0+\).*with other \(weights"):
        Index.open(address, stand_in("other", seed=1))
    with pytest.raises(ValueError, match="holds the vectors embedding of stand-in, not branch_S"):
        Index.open(address, stand_in(), vector="branch_S")
    with pytest.raises(FileNotFoundError, match="made with the network stand-in, which is not the"):
        Index.open(address).embed([Image.new("RGB", (8, 8))])


def test_an_index_that_does_not_say_what_it_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(indexes.json, "dumps", lambda values: '{"precision": "float32"}')
    with pytest.raises(StoreError, match="does not say what it holds.*Delete it"):
        Index.create(tmp_path / "index", stand_in())


def test_batches_are_of_sizes_that_are_compiled_and_not_padded(monkeypatch):
    sizes = []
    network = stand_in()

    def embed(images):
        sizes.append(len(images))
        return network.embed_pixels(images)

    counted = stand_in()
    counted.embed_pixels = embed
    pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8)
    found = indexes.embed_pixels(counted, pixels)
    np.testing.assert_allclose(found, network.embed_pixels(pixels), atol=1e-6)
    assert sizes == 10 * [1]  # on every core another one
    sizes.clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(indexes, "BATCHES", (1, 4))
    found = indexes.embed_pixels(counted, pixels)
    np.testing.assert_allclose(found, network.embed_pixels(pixels), atol=1e-6)
    assert sizes == [4, 4, 1, 1] and indexes.enough() == 4


def test_duplicates_are_chained_into_groups(tmp_path):
    index = Index.create(tmp_path / "index", stand_in())
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(6)]
    for i in range(3):  # each is more like the one before than like the first
        nearly = images[[0, 6, 7][i]].astype(int) + rng.integers(-25, 25, (8, 8, 3))
        images.append(np.clip(nearly, 0, 255).astype(np.uint8))
    images.append(np.clip(images[1].astype(int) + 1, 0, 255).astype(np.uint8))
    ids = index.add(images)
    vectors = stand_in().embed(np.stack(images))
    similarity = vectors @ vectors.T - 2 * np.eye(len(images))
    linked = similarity >= 0.95
    reachable = linearly = linked | np.eye(len(images), dtype=bool)
    for _ in images:
        reachable = (reachable.astype(int) @ linearly.astype(int)) > 0
    expected = {frozenset(np.flatnonzero(row)) for row in reachable if row.sum() > 1}
    assert sorted(map(len, expected)) == [2, 4]
    groups = find_duplicates(index, 0.95)
    found = {frozenset(ids.index(hit.id) for hit in group.members) for group in groups}
    assert found == expected
    for group in groups:
        for hit in group.members:
            nearest = similarity[ids.index(hit.id)].max()
            assert hit.similarity == pytest.approx(nearest, abs=1e-5)
        assert group.similarity == group.members[-1].similarity
    assert find_duplicates(index, 1.0, "width > 100") == []
    with pytest.raises(ValueError, match="--similarity=0: must be above 0"):
        find_duplicates(index, 0)


def test_duplicates_of_large_indexes_are_searched_for(filled, monkeypatch):
    from cgd_jax.search import duplicates

    index, *_ = filled
    expected = find_duplicates(index, 0.3)
    monkeypatch.setattr(duplicates, "EXACT_UP_TO", 1)
    monkeypatch.setattr(duplicates, "BLOCK", 7)
    found = find_duplicates(index, 0.3)
    assert expected and [len(group.members) for group in found] == [
        len(group.members) for group in expected
    ]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "I;16"])
def test_a_picture_in_memory_is_read_as_its_file(mode):
    grey = np.linspace(0, 65535, 30 * 20).reshape(20, 30)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16))
    else:
        image = Image.fromarray((grey / 257).astype(np.uint8)).convert(mode)
    file = io.BytesIO()
    image.save(file, "TIFF")
    read = pictures.read(file.getvalue(), 16)
    np.testing.assert_array_equal(pictures.read_image(image, 16).pixels, read.pixels)
