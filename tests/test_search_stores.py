"""Both databases keep what they are given, find what is near, and fail in one clear sentence."""

import importlib.util
import json
import shutil
import sys

import numpy as np
import pytest

from cgd_jax.search import stores
from cgd_jax.search.stores import NoIndexError, StoreError, open_store

DIMENSION = 16


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


def about(precision="float32"):
    return {"info": json.dumps({"precision": precision}), "long": "é" + "x" * 130_000}


def rows(count, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, DIMENSION)).astype(np.float32)
    ids = [f"{seed:02}{i:04}" for i in range(count)]
    return {
        "id": ids,
        "path": [f"/photos/it's {i}.jpg" for i in ids],
        "label": [(None, "it's", "shoes")[i % 3] for i in range(count)],
        "size": list(range(count)),
        "hash": ids,
        "width": [3] * count,
        "height": [2] * count,
        "source": ["/photos"] * count,
        "modified": [10**18 + i for i in range(count)],
        "thumbnail": [bytes([i % 256, 0, 255]) for i in range(count)],
        "vector": vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
    }


def part(columns, count):
    return {name: values[:count] for name, values in columns.items()}


def everything(store):
    names = [*stores.COLUMNS, "vector"]
    found = {}
    for columns in store.read(names):
        for values in zip(*(columns[name] for name in names), strict=True):
            found[values[0]] = values
    return found


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("index", marks=needs("lancedb")),
        pytest.param("index.db", marks=[needs("pymilvus"), needs("milvus_lite")]),
    ],
)
def filled(request, tmp_path_factory):
    """An index of 60 rows in either database, and the rows."""
    address = str(tmp_path_factory.mktemp("store") / request.param)
    with pytest.raises(NoIndexError, match="there is no index. Make one first"):
        open_store(address)
    store = open_store(address, about(), DIMENSION)
    columns = rows(60)
    store.upsert(columns)
    yield store, columns
    store.close()


def test_rows_come_back_as_they_were(filled):
    store, columns = filled
    found = everything(store)
    assert len(found) == store.count() == 60
    for i, id in enumerate(columns["id"]):
        for name, value in zip(stores.COLUMNS, found[id], strict=False):
            assert value == columns[name][i], name
        np.testing.assert_array_equal(found[id][-1], columns["vector"][i])
    assert store.about == about()


def test_the_nearest_are_found_in_order(filled):
    store, columns = filled
    queries = rows(3, seed=1)["vector"]
    similarity = queries @ columns["vector"].T
    for hits, expected in zip(store.search(queries, 7), similarity, strict=True):
        order = np.argsort(-expected)[:7]
        assert [hit.id for hit in hits] == [columns["id"][i] for i in order]
        np.testing.assert_allclose([hit.similarity for hit in hits], expected[order], atol=1e-6)
        assert [hit.label for hit in hits] == [columns["label"][i] for i in order]
        assert [hit.path for hit in hits] == [columns["path"][i] for i in order]
    assert len(store.search(queries, 100)[0]) == 60


@pytest.mark.parametrize(
    "where, holds",
    [
        ("label = 'shoes'", lambda label, size: label == "shoes"),
        ("label = 'it''s' AND size >= 30", lambda label, size: label == "it's" and size >= 30),
        ("label IN ('shoes', 'it''s')", lambda label, size: label is not None),
        ("label IS NULL OR size <> 2", lambda label, size: label is None or size != 2),
        ("NOT (size < 10) and path LIKE '/photos/%'", lambda label, size: size >= 10),
        ("label = 'a = b' or size != 4", lambda label, size: size != 4),
    ],
)
def test_conditions_mean_the_same_in_both(filled, where, holds):
    store, columns = filled
    pairs = list(zip(columns["label"], columns["size"], strict=True))
    chosen = {id for id, pair in zip(columns["id"], pairs, strict=True) if holds(*pair)}
    assert store.count(where) == len(chosen)
    (hits,) = store.search(columns["vector"][:1], 60, where)
    assert {hit.id for hit in hits} == chosen
    assert {id for piece in store.read(["id"], where) for id in piece["id"]} == chosen


@pytest.mark.parametrize("where", ["labl = 'x'", "label = = 'x'", "label = 'x", "label IN ("])
def test_conditions_that_are_none(filled, where):
    store, columns = filled
    with pytest.raises(ValueError, match="--where=.* is not understood: "):
        store.count(where)
    with pytest.raises(ValueError, match="--where=.* is not understood: "):
        store.search(columns["vector"][:1], 1, where)


def test_rows_are_replaced_and_deleted(filled):
    store, columns = filled
    changed = part(columns, 2) | {"label": ["new", None], "vector": columns["vector"][2:4]}
    store.upsert(changed)
    assert store.count() == 60 and store.count("label = 'new'") == 1
    np.testing.assert_array_equal(everything(store)[columns["id"][0]][-1], columns["vector"][2])
    store.upsert(rows(3, seed=2))
    assert store.count() == 63
    store.delete([*rows(3, seed=2)["id"], "nobody's"])
    store.upsert(part(columns, 2))
    assert len(everything(store)) == store.count() == 60
    store.finish()
    again = open_store(store.address)
    assert again.count() == 60 and again.about == about()


@needs("lancedb")
def test_half_precision_halves_the_vectors(tmp_path):
    store = open_store(str(tmp_path / "half"), about("float16"), DIMENSION)
    columns = rows(20)
    store.upsert(columns)
    found = everything(store)
    expected = columns["vector"].astype(np.float16).astype(np.float32)
    stored = np.stack([found[id][-1] for id in columns["id"]])
    np.testing.assert_array_equal(stored, expected)
    (hits,) = store.search(columns["vector"][5:6], 1)
    assert hits[0].id == columns["id"][5] and hits[0].similarity == pytest.approx(1, abs=1e-3)


@needs("pymilvus")
def test_milvus_has_no_half_precision(tmp_path):
    with pytest.raises(ValueError, match="holds vectors in float32. Leave --precision out"):
        open_store(str(tmp_path / "a.db"), about("float16"), DIMENSION)
    assert not (tmp_path / "a.db").exists()


@needs("lancedb")
def test_approximate_search_finds_what_exact_search_finds(tmp_path, monkeypatch):
    from cgd_jax.search import lancedb_store

    monkeypatch.setattr(lancedb_store, "APPROXIMATE_FROM", 1)
    monkeypatch.setattr(lancedb_store, "INDEX_IDS_FROM", 1)
    store = open_store(str(tmp_path / "index"), about(), DIMENSION)
    store.upsert(rows(2000))
    store.finish()
    assert sorted(index.columns for index in store._table.list_indices()) == [["id"], ["vector"]]
    store.upsert(rows(50, seed=3))  # which the approximate index does not hold yet
    queries = rows(20, seed=1)["vector"]
    shared = [
        len({hit.id for hit in near} & {hit.id for hit in exact})
        for near, exact in zip(
            store.search(queries, 10), store.search(queries, 10, exact=True), strict=True
        )
    ]
    assert np.mean(shared) >= 9.8
    (hits,) = store.search(rows(50, seed=3)["vector"][7:8], 1)
    assert hits[0].id == "030007"


@needs("lancedb")
def test_parts_are_joined_when_there_are_many(tmp_path):
    store = open_store(str(tmp_path / "index"), about(), DIMENSION)
    parts = lambda: store._table.stats()["fragment_stats"]["num_fragments"]
    for seed in range(10):
        store.upsert(rows(3, seed))
    store.finish()
    assert parts() == 10
    store.upsert(rows(3, 10))
    store.finish()
    assert parts() == 1 and store.count() == 33
    store.upsert(rows(30, 11))
    store.delete(rows(20, 11)["id"])
    store.finish()
    assert parts() == 1 and store.count() == 43


@needs("lancedb")
def test_damaged_files_are_named(tmp_path):
    address = tmp_path / "index"
    open_store(str(address), about(), DIMENSION).upsert(rows(50))
    whole = tmp_path / "whole"
    shutil.copytree(address, whole)
    for file in (address / "pictures.lance/data").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    store = open_store(str(address))
    with pytest.raises(StoreError, match="could not be read: .* delete it and index"):
        store.search(rows(1)["vector"], 3)
    shutil.copytree(whole, address, dirs_exist_ok=True)
    for file in (address / "pictures.lance/_versions").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(StoreError, match="could not be opened: "):
        open_store(str(address))


@needs("lancedb")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of file sizes")
def test_a_full_disk_loses_nothing_that_was_written(tmp_path):
    import resource

    store = open_store(str(tmp_path / "index"), about(), DIMENSION)
    store.upsert(rows(50))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(StoreError, match="could not be written: .*too large.* it goes on"):
            store.upsert(rows(2000, seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.count() == 50
    store.upsert(rows(2000, seed=1))
    assert open_store(str(tmp_path / "index")).count() == 2050


@needs("pymilvus")
def test_no_server(tmp_path):
    with pytest.raises(StoreError, match="http://localhost:9 could not be opened: "):
        open_store("http://localhost:9")


@pytest.mark.parametrize(
    "package, adapter, address, extra",
    [
        ("lancedb", "lancedb_store", "index", "search"),
        ("pymilvus", "milvus_store", "index.db", "milvus"),
    ],
)
def test_a_missing_package_is_named(package, adapter, address, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"cgd_jax.search.{adapter}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'cgd_jax\[{extra}\]'"):
        open_store(address)
