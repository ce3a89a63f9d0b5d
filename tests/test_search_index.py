"""An index answers like an exhaustive search with the network that it belongs to, and no other."""

import contextlib
import io
import json
import os
import shutil
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cgd_jax import network as networks
from cgd_jax.preprocess import IMAGENET
from cgd_jax.runtime.errors import InputError
from cgd_jax.search import (
    Hit,
    Index,
    Record,
    StoreError,
    duplicates,
    filling,
    images,
    queries,
    report,
)
from cgd_jax.search.collection import Collection
from cgd_jax.search.duplicates import Group, find_duplicates
from cgd_jax.serve import command as serving
from tests.search_samples import folder_of_photographs, photograph, stand_in, vectors_of

pytest.importorskip("lancedb", reason="lancedb is not installed")

# Whatever is done to an index in milvus-lite takes a second.
DATABASES = ["index", pytest.param("index.db", marks=pytest.mark.slow)]


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
    if exact:  # in memory
        monkeypatch.setattr(index.store, "approximate", lambda: True)
    for where, chosen in ((None, range(20)), ("label = 'hats'", range(10)), ("size < 0", ())):
        found = index.search_vectors(vectors[:3], 5, where, exact)
        for hits, query in zip(found, vectors[:3], strict=True):
            order = sorted(chosen, key=lambda i: -vectors[i] @ query)[:5]
            assert [(hit.id, hit.path) for hit in hits] == [(ids[i], str(files[i])) for i in order]
            expected = [vectors[i] @ query for i in order]
            np.testing.assert_allclose([hit.similarity for hit in hits], expected, atol=1e-6)


@pytest.mark.parametrize("database", DATABASES)
@pytest.mark.parametrize("exact", [False, True])
def test_pages_neither_repeat_nor_omit_equal_images(tmp_path, database, exact, monkeypatch):
    """What fewer hits end with is what more go on from, whatever the order of writing."""
    pytest.importorskip("milvus_lite" if database.endswith(".db") else "lancedb")
    index = Index.create(tmp_path / database, stand_in())
    monkeypatch.setattr(index.store, "approximate", lambda: exact)
    vectors = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    ids = np.random.default_rng(1).permutation(80)
    for some in np.split(ids, 4):  # as many files of the database
        index.write([Record(f"{i:03}") for i in some], vectors[some % 4])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = unit @ unit[0]
    whole = sorted(range(80), key=lambda i: (-similarity[i % 4], i))
    for k in (1, 3, 20, 21, 37, 60, 79, 80, 100):
        hits = index.search(vectors[0], k, exact=exact)
        assert [int(hit.id) for hit in hits] == whole[:k]


def test_a_query_may_be_a_file_an_image_pixels_a_vector_or_several(filled):
    index, files, ids, vectors = filled
    image = Image.open(files[4])
    queries = [files[4], str(files[4]), files[4].read_bytes(), image, np.asarray(image)]
    for query in (*queries, 3 * vectors[4], jnp.asarray(vectors[4])):
        hits = index.search(query, 3)
        assert hits[0].id == ids[4] and hits[0].similarity == pytest.approx(1, abs=1e-5)
    found = index.search([*queries, files[5]], 1)
    assert [hit.id for [hit] in found] == [ids[4]] * len(queries) + [ids[5]]
    assert index.search([]) == [] and len(index.search([image], 2)) == 1
    np.testing.assert_allclose(index.embed([image, image]), vectors[[4, 4]], atol=1e-6)
    # A part of an image is what would be found by the part as an image of its own.
    box = 6, 5, 18, 16
    expected = index.embed([image.crop(box)])[0]
    for query in (files[4], image, np.asarray(image)):
        pixels, _ = images.read(query, index.info.resize, box)
        np.testing.assert_allclose(index.embed(pixels)[0], expected, atol=1e-6)


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
    with pytest.raises(ValueError, match=r"array of shape \(4, 4\) and dtype float64"):
        index.search(np.zeros((4, 4)))


def test_what_is_known_of_an_image(filled):
    index, files, ids, vectors = filled
    record = index.get(ids[0])
    assert record[:4] == (ids[0], str(files[0]), "hats", files[0].stat().st_size)
    assert (record.width, record.height) == (24, 16)
    assert record.thumbnail == index.thumbnail(ids[0])
    thumbnail = Image.open(io.BytesIO(record.thumbnail))
    assert thumbnail.format == "JPEG" and thumbnail.size == (24, 16)
    pixels = np.asarray(Image.open(files[0]).convert("RGB"), int)
    assert np.abs(np.asarray(thumbnail) - pixels).mean() < 12  # red and blue are where they were
    np.testing.assert_allclose(index.vector(ids[0]), vectors[0], atol=1e-6)
    assert index.get("nobody's") is None
    for method in (index.thumbnail, index.vector):
        with pytest.raises(KeyError, match="no image '../../etc/passwd'"):
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


def test_an_index_says_what_it_is_and_follows_a_folder(tmp_path):
    photos = folder_of_photographs(tmp_path / "photos", 4)
    index = Index.create(tmp_path / "index", stand_in())
    assert len(index) == 0 and index.update(photos).added == 4
    (photos / "hats/000.png").unlink()
    assert index.update(photos).removed == 1 and len(index) == 3
    assert repr(index) == (
        f"Index({str(tmp_path / 'index')!r}, network='stand-in', vector='embedding', dimension=16)"
    )


def test_an_index_may_be_compressed(tmp_path, monkeypatch):
    for dimension, compress in ((12, "pq"), (12, "binary"), (16, "zip")):
        with pytest.raises(InputError, match=f"compress={compress}: it is pq or binary.*of 8, not"):
            Index.create(tmp_path / "none", stand_in(dimension=dimension), compress=compress)
    index = Index.create(tmp_path / "index", stand_in(), compress="binary")
    assert "dimension=16, compress='binary')" in repr(index)
    index.update(folder_of_photographs(tmp_path / "photos"))
    again = Index.open(tmp_path / "index", stand_in())
    assert again.info.compress == "binary" and again.update(tmp_path / "photos").unchanged == 12
    assert Collection(again).vectors is None  # they are never all in memory


def test_images_come_and_go(tmp_path):
    index = Index.open(tmp_path / "index", stand_in(), create=True)
    assert index.search(np.ones(16)) == [] and index.vectors()[1].shape == (0, 16)
    assert index.add([]) == []
    files = [photograph(tmp_path / f"{i}.png", i) for i in range(3)]
    image = Image.open(files[2])
    ids = index.add([files[0], files[1], image, files[0]], ["a", "b", None, "a"])
    assert index.count() == 3 and ids[0] == ids[3] and index.get(ids[2]).path == ""
    assert sorted(index.vectors()[0]) == sorted(ids[:3])
    other = Index.open(tmp_path / "index", stand_in())
    other.remove([ids[1], "nobody's"])
    other.add([files[0]], ["c"])
    assert index.count() == 2 and index.labels() == {"c": 1}
    assert sorted(index.vectors()[0]) == sorted([ids[0], ids[2]])  # nothing old is remembered
    (tmp_path / "bad.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="bad.jpg: empty file"):
        index.add([files[1], tmp_path / "bad.jpg"])
    assert index.count() == 2


def of_size(image_size, resize):
    data = {"image_size": image_size, "resize": resize}
    return {"data": data, "eval": {"center_crop": True}}


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"name": "other", "weights_hash": "1"}, "other is another .*weights_hash 0+, here 1"),
        ({"vector": "branch_S"}, "vector embedding, here branch_S"),
        ({"config": of_size(9, 8)}, "image_size 8, here 9"),
        ({"config": of_size(8, 9)}, "resize 8, here 9"),
        (
            {"normalization": IMAGENET._replace(mean=np.zeros(3, np.float32))},
            "normalization .*0.485",
        ),
    ],
)
def test_another_network_is_refused_with_both_named(filled, changes, named, monkeypatch):
    index, *_ = filled
    other = stand_in()
    vars(other).update(changes)
    message = f"made with the network stand-in; .*{named}.* make another index with --index="
    for make in (Index.open, Index.create):
        with pytest.raises(InputError, match=message):
            make(index.address, other)
    # It is known only when the network is opened.
    monkeypatch.setattr(networks, "open_network", lambda source, vector, **seen: other)
    with pytest.raises(InputError, match=message):
        Index.open(index.address).embed([Image.new("RGB", (8, 8))])


USES = {
    "search": lambda index, file: index.search(file),
    "count": lambda index, file: index.count(),
    "get": lambda index, file: index.get("x"),
    "vector": lambda index, file: index.vector("x"),
    "vectors": lambda index, file: index.vectors(),
    "hits": lambda index, file: index.hits(["x"]),
    "labels": lambda index, file: index.labels(),
    "to_arrow": lambda index, file: index.to_arrow(),
    "add": lambda index, file: index.add(file),
    "remove": lambda index, file: index.remove(["x"]),
}


@pytest.mark.parametrize("database", DATABASES)
@pytest.mark.parametrize("change", ["network", "whitening"])
def test_an_index_that_is_replaced_is_not_used_with_what_is_known_of_the_old(
    tmp_path, database, change
):
    pytest.importorskip("milvus_lite" if database.endswith(".db") else "lancedb")
    address, files = tmp_path / database, [photograph(tmp_path / "a.png", 1)]
    rng = np.random.default_rng(0)
    whitenings = [(rng.normal(size=16), rng.normal(size=(16, 16))) for _ in range(2)]
    whitening, others = (whitenings[0], whitenings[1:]) if change == "whitening" else (None, [None])
    index = Index.create(address, stand_in(), whitening=whitening)
    index.add(files)
    assert index.search(files[0])[0].similarity == 1
    if database == "index":
        shutil.rmtree(address)
    else:
        for name in ("cgd_images", "cgd_about"):
            index.store._client.drop_collection(name)
    # As many writes: the version of the table is the same.
    network = stand_in("other", seed=1) if change == "network" else stand_in()
    other = Index.create(address, network, whitening=others[0])
    other.add(files)
    for name, use in USES.items():
        with pytest.raises(StoreError, match="was replaced by another one.*Open it again"):
            use(index, files[0])
            pytest.fail(name)
    assert other.count() == 1 and other.search(files[0])[0].similarity == 1


def test_an_index_of_a_version_that_knew_no_shapes(tmp_path, monkeypatch):
    index = Index.create(tmp_path / "index", stand_in())
    index.add([photograph(tmp_path / "a.png", 1)])
    said = json.loads(index.store.about("info"))
    older = {key: value for key, value in said.items() if key not in ("shapes", "scales")}
    assert len(older) == len(said) - 2
    monkeypatch.setattr(type(index.store), "about", lambda store, name: json.dumps(older))
    again = Index.open(tmp_path / "index", stand_in())
    assert again.count() == 1 and again.search(tmp_path / "a.png")[0].similarity == 1


def test_a_network_that_is_not_there(filled):
    index, *_ = filled
    with pytest.raises(InputError, match="vector embedding, here branch_S"):
        Index.open(index.address, stand_in(), vector="branch_S")
    with pytest.raises(InputError, match="made with the network stand-in, which is not there"):
        Index.open(index.address).embed([Image.new("RGB", (8, 8))])


@pytest.mark.parametrize("name", ["owner/name", "owner/name@main", "../photos/x", "a/b/c"])
def test_a_strangers_index_makes_nobody_ask_the_hub(tmp_path, name, monkeypatch):
    photograph(tmp_path / "a.png", 1)
    Index.create(tmp_path / "index", stand_in(name)).add([tmp_path / "a.png"])
    asked = []
    open_network = lambda source, vector, **seen: asked.append(source) or stand_in(source)
    monkeypatch.setattr(networks, "open_network", open_network)
    monkeypatch.chdir(tmp_path)
    index = Index.open("index")
    assert index.count() == 1 and index.vectors()[1].shape == (1, 16)  # needs no network
    uses = index.search, index.add, partial(queries.ask, index)
    for use in uses:
        with pytest.raises(InputError, match=f"of Hugging Face, .* say --model={name}.$"):
            use(["a.png"])
    with pytest.raises(InputError, match="of Hugging Face"):
        filling.update("index", [photograph(tmp_path / "photos/b.png", 2).parent])
    with pytest.raises(InputError, match="of Hugging Face"):
        serving.warm_up(index)
    assert not asked
    monkeypatch.setattr(networks, "identify", lambda model: (name, stand_in().weights_hash))
    assert Index.open("index", name).search("a.png")[0].similarity == 1 and asked == [name]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"resize": 1_000_000}, "resize 1000000, here 8"),
        ({"resize": -1}, "resize -1, here 8"),
        ({"resize": "8"}, "resize 8, here 8"),
        ({"image_size": 0}, "image_size 0, here 8"),
        ({"image_size": None}, "image_size None, here 8"),
        ({"dimension": 10**12}, "dimension 1000000000000, here 16"),
        ({"normalization": {}}, "normalization {}, here"),
        ({"network": 5}, "does not say what it holds"),
        ({"network": None}, "does not say what it holds"),
        ({"whitened_from": 16}, "does not say what it holds"),
        ({"whitened_from": 10**12}, "does not say what it holds"),
        ({"whitened_from": "many"}, "does not say what it holds"),
    ],
)
def test_what_a_strangers_index_says_is_compared_before_it_is_used(
    tmp_path, changes, message, monkeypatch
):
    """Nothing is read, allocated or computed in a size that only the index names."""
    photograph(tmp_path / "photos/a.png", 1)
    dumps = json.dumps
    monkeypatch.setattr(json, "dumps", lambda info: dumps(info | changes))
    with contextlib.suppress(InputError, StoreError):
        Index.create(tmp_path / "index", stand_in())
    monkeypatch.undo()
    monkeypatch.setattr(networks, "open_network", lambda source, vector, **seen: stand_in())
    address, photos = str(tmp_path / "index"), tmp_path / "photos"
    for use in (
        lambda: queries.ask(Index.open(address), [str(photos)]),
        lambda: Index.open(address).search(photos / "a.png"),
        lambda: Index.open(address).add([photos / "a.png"]),
        lambda: Index.open(address, stand_in()),
        lambda: filling.update(address, [photos]),
        lambda: serving.warm_up(Index.open(address)),
    ):
        with pytest.raises((InputError, StoreError), match=message):
            use()


def test_a_whitening_of_another_network_is_refused(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    whitening = rng.normal(size=12), rng.normal(size=(12, 5))
    Index.create(tmp_path / "index", stand_in(dimension=12), whitening=whitening)
    monkeypatch.setattr(networks, "open_network", lambda source, vector, **seen: stand_in())
    with pytest.raises(InputError, match="whitened_from 12, here 16"):
        Index.open(tmp_path / "index").search(Image.new("RGB", (8, 8)))


def test_thumbnails_of_a_stranger_are_small_images_or_refused(tmp_path):
    index = Index.create(tmp_path / "index", stand_in())
    large = io.BytesIO()
    Image.new("RGB", (5000, 10)).save(large, "PNG")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    index.write([Record("a", thumbnail=large.getvalue())], np.ones((1, 16)))
    hit = Hit("a", 1.0, None, "a.jpg")
    report.draw_groups(tmp_path / "a.png", index, [Group(1.0, [hit])])
    with Image.open(tmp_path / "a.png") as drawn:
        assert max(drawn.size) < 400
    index.write([Record("a", thumbnail=script)], np.ones((1, 16)))
    with pytest.raises(StoreError, match="not an image"):
        report.draw_groups(tmp_path / "a.png", index, [Group(1.0, [hit])])


def test_an_index_that_does_not_say_what_it_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(json, "dumps", lambda values: '{"precision": "float32"}')
    with pytest.raises(StoreError, match="does not say what it holds.*Delete it"):
        Index.create(tmp_path / "index", stand_in())


@pytest.mark.parametrize(
    ("block", "candidates", "directions"), [(256, 100, 128), (3, 100, 1), (1, 1, 8)]
)
def test_duplicates_are_chained_into_groups(tmp_path, monkeypatch, block, candidates, directions):
    """In blocks too; where few directions tell little apart, and where an image has many copies."""
    monkeypatch.setattr(duplicates, "BLOCK", block)
    monkeypatch.setattr(duplicates, "TILE", block + 1)
    monkeypatch.setattr(duplicates, "CANDIDATES", candidates)
    monkeypatch.setattr(duplicates, "DIRECTIONS", directions)
    index = Index.create(tmp_path / "index", stand_in())
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(6)]
    for i in range(3):  # each is more like the one before than like the first
        nearly = pixels[[0, 6, 7][i]].astype(int) + rng.integers(-25, 25, (8, 8, 3))
        pixels.append(np.clip(nearly, 0, 255).astype(np.uint8))
    pixels.append(np.clip(pixels[1].astype(int) + 1, 0, 255).astype(np.uint8))
    ids = index.add(pixels)
    vectors = stand_in().embed_batch(np.stack(pixels))
    similarity = vectors @ vectors.T - 2 * np.eye(len(pixels))
    linked = similarity >= 0.95
    reachable = linearly = linked | np.eye(len(pixels), dtype=bool)
    for _ in pixels:
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


def test_an_image_that_is_there_many_times_is_one_group(tmp_path, monkeypatch):
    """The last few of many, whose nearest are the first ones, belong to them."""
    for name, number in (("BLOCK", 8), ("CANDIDATES", 3), ("NEIGHBOURS", 2)):
        monkeypatch.setattr(duplicates, name, number)
    index = Index.create(tmp_path / "index", stand_in())
    vectors = np.random.default_rng(0).standard_normal((60, 16)).astype(np.float32)
    vectors[:42] = vectors[0]
    index.write([Record(f"{i:02}", f"{i}.jpg") for i in range(60)], vectors)
    (group,) = find_duplicates(index, 0.999)
    assert sorted(hit.id for hit in group.members) == [f"{i:02}" for i in range(42)]


def test_names_of_one_file_are_no_duplicates(tmp_path):
    """Links in one source count once; those in sources of their own are never a pair."""
    photos = folder_of_photographs(tmp_path / "photos", 4)
    first = photos / "hats/000.png"
    (photos / "hats/soft.png").symlink_to(first)
    os.link(first, photos / "hats/hard.png")
    (tmp_path / "linked").symlink_to(photos)
    index = Index.create(tmp_path / "index", stand_in())
    assert index.update(photos).added == 4 and find_duplicates(index, 0.999) == []
    index.update(tmp_path / "linked")
    (tmp_path / "list.csv").write_text(f"path,label\nphotos/hats/hard.png,x\n{first},x\n")
    index.update(tmp_path / "list.csv")
    assert index.count() == 4 + 4 + 1 and find_duplicates(index, 0.999) == []
    shutil.copy(first, photos / "copy.png")
    index.update(photos, tmp_path / "linked")
    (group,) = find_duplicates(index, 0.999)
    files = {os.stat(hit.path).st_ino for hit in group.members}
    assert len(group.members) == len(files) == 2 and group.similarity == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "I;16"])
def test_an_image_in_memory_is_read_as_its_file(mode):
    grey = np.linspace(0, 65535, 30 * 20).reshape(20, 30)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16))
    else:
        image = Image.fromarray((grey / 257).astype(np.uint8)).convert(mode)
    file = io.BytesIO()
    image.save(file, "TIFF")
    np.testing.assert_array_equal(images.read(image, 16)[0], images.read(file.getvalue(), 16)[0])
