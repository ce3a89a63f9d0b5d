"""Both databases keep what they are given, find what is near, and fail in one clear sentence."""

import importlib.util
import json
import shutil
import sys

import numpy as np
import pytest

from cgd_jax.runtime.errors import InputError
from cgd_jax.search import stores
from cgd_jax.search.opening import open_store
from cgd_jax.search.stores import NoIndexError, Record, StoreError

DIMENSION = 16


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


def about(precision="float32", compress=None):
    info = json.dumps({"precision": precision, "compress": compress})
    return {"info": info, "long": "é" + "x" * 130_000}


def rows(count, seed=0):
    """Returns records, and their vectors."""
    vectors = np.random.default_rng(seed).normal(size=(count, DIMENSION)).astype(np.float32)
    ids = [f"{seed:02}{i:04}" for i in range(count)]
    records = [
        Record(
            id=id,
            path=f"/photos/it's {id}.jpg",
            label=(None, "it's", "shoes")[i % 3],
            size=i,
            hash=id,
            width=3,
            height=2,
            source="/photos",
            modified=10**18 + i,
            thumbnail=bytes([i % 256, 0, 255]),
        )
        for i, id in enumerate(ids)
    ]
    return records, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def upsert(store, records, vectors):
    store.upsert(stores.as_table(records, vectors))


def everything(store):
    """Returns (record, vector) by id."""
    found = {}
    for batch in store.read([*stores.COLUMNS, "vector"]):
        vectors = stores.vectors_in(batch)
        for row, vector in zip(batch.drop_columns(["vector"]).to_pylist(), vectors, strict=True):
            found[row["id"]] = Record(**row), vector
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
    records, vectors = rows(60)
    upsert(store, records, vectors)
    return store, records, vectors


def test_rows_come_back_as_they_were(filled):
    store, records, vectors = filled
    found = everything(store)
    assert len(found) == store.count() == 60
    for record, vector in zip(records, vectors, strict=True):
        assert found[record.id][0] == record
        np.testing.assert_array_equal(found[record.id][1], vector)
    assert {name: store.about(name) for name in about()} == about()
    assert store.about("lon") is store.about("none") is None


def test_the_nearest_are_found(filled):
    store, records, vectors = filled
    queries = rows(3, seed=1)[1]
    similarity = queries @ vectors.T
    for hits, expected in zip(store.search(queries, 7), similarity, strict=True):
        hits.sort(key=lambda hit: -hit.similarity)
        order = np.argsort(-expected)[:7]
        np.testing.assert_allclose([hit.similarity for hit in hits], expected[order], atol=1e-6)
        shown = [(records[i].id, records[i].label, records[i].path) for i in order]
        assert [(hit.id, hit.label, hit.path) for hit in hits] == shown
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
    store, records, vectors = filled
    chosen = {record.id for record in records if holds(record.label, record.size)}
    assert store.count(where) == len(chosen)
    (hits,) = store.search(vectors[:1], 60, where)
    assert {hit.id for hit in hits} == chosen
    assert {id for piece in store.read(["id"], where) for id in piece["id"].to_pylist()} == chosen


CONTROLS = [chr(code) for code in (0, 1, 7, 9, 10, 11, 13, 27, 31, 127, 0x85, 0x2028)]


@pytest.mark.parametrize("letter", [*CONTROLS, "\\", '"', "\\n", "\\x41", "\\u0041", "'", "%"])
def test_no_letter_of_an_id_or_a_label_is_special(filled, letter):
    """Whoever asks for ids and labels that are none gets nothing, and no error."""
    store, records, vectors = filled
    odd, other = f"a{letter}b", f"a{letter}{letter}b"
    upsert(store, [records[0]._replace(id="odd", label=odd)], vectors[:1])
    try:
        assert store.count(f"label = {stores.quoted(odd)}") == 1
        assert store.count(f"label = {stores.quoted(other)}") == 0
        (hits,) = store.search(vectors[:1], 5, f"label IN ({stores.quoted(odd)}, 'none')")
        assert [hit.label for hit in hits] == [odd]
        (where,) = stores.among([odd, "odd"])
        ids = [batch["id"].to_pylist() for batch in store.read(["id"], where)]
        assert [id for some in ids for id in some] == ["odd"]
    finally:
        store.delete(["odd"])


@pytest.mark.parametrize("where", ["labl = 'x'", "label = = 'x'", "label = 'x", "label IN ("])
def test_conditions_that_are_none(filled, where):
    store, _, vectors = filled
    with pytest.raises(InputError, match="--where=.* is not understood: "):
        store.count(where)
    with pytest.raises(InputError, match="--where=.* is not understood: "):
        store.search(vectors[:1], 1, where)


def test_rows_are_replaced_and_deleted(filled):
    store, records, vectors = filled
    changed = [records[0]._replace(label="new"), records[1]._replace(label=None)]
    upsert(store, changed, vectors[2:4])
    assert store.count() == 60 and store.count("label = 'new'") == 1
    np.testing.assert_array_equal(everything(store)[records[0].id][1], vectors[2])
    more = rows(3, seed=2)
    upsert(store, *more)
    assert store.count() == 63
    store.delete([*(record.id for record in more[0]), "nobody's"])
    upsert(store, records[:2], vectors[:2])
    assert len(everything(store)) == store.count() == 60
    store.finish()
    again = open_store(store.address)
    assert again.count() == 60 and again.about("long") == about()["long"]


@needs("lancedb")
def test_half_precision_halves_the_vectors(tmp_path):
    store = open_store(str(tmp_path / "half"), about("float16"), DIMENSION)
    records, vectors = rows(20)
    upsert(store, records, vectors)
    found = everything(store)
    stored = np.stack([found[record.id][1] for record in records])
    np.testing.assert_array_equal(stored, vectors.astype(np.float16).astype(np.float32))
    (hits,) = store.search(vectors[5:6], 1)
    assert hits[0].id == records[5].id and hits[0].similarity == pytest.approx(1, abs=1e-3)


@needs("pymilvus")
@pytest.mark.parametrize("chosen", [("float16",), ("float32", "pq")])
def test_milvus_has_vectors_in_float32_alone(chosen, tmp_path):
    with pytest.raises(InputError, match="holds vectors in float32. Leave --precision and --com"):
        open_store(str(tmp_path / "a.db"), about(*chosen), DIMENSION)
    assert not (tmp_path / "a.db").exists()


@needs("lancedb")
@pytest.mark.parametrize("compress", [None, "pq", "binary"])
def test_approximate_search_finds_what_exact_search_finds(compress, tmp_path, monkeypatch):
    from cgd_jax.search import lancedb_store

    monkeypatch.setattr(lancedb_store, "APPROXIMATE_FROM", 1)
    monkeypatch.setattr(lancedb_store, "INDEX_IDS_FROM", 1)
    open_store(str(tmp_path / "index"), about(compress=compress), DIMENSION)
    store = open_store(str(tmp_path / "index"))  # which learns from it how to compress
    records, vectors = rows(2000)
    upsert(store, records, vectors)
    assert not store.approximate()
    store.finish()
    assert store.approximate()
    kinds = {None: "IvfSq", "pq": "IvfPq", "binary": "IvfRq"}
    built = sorted((index.columns, index.index_type) for index in store._table.list_indices())
    assert built == [(["id"], "BTree"), (["vector"], kinds[compress])]
    new, new_vectors = rows(50, seed=3)
    upsert(store, new, new_vectors)  # which the approximate index does not hold yet
    queries = rows(20, seed=1)[1]
    ids = np.array([record.id for record in records + new])
    nearest = np.argsort(-(queries @ np.concatenate([vectors, new_vectors]).T))[:, :10]
    shared = [
        len({hit.id for hit in near} & set(ids[exact]))
        for near, exact in zip(store.search(queries, 10), nearest, strict=True)
    ]
    assert np.mean(shared) >= 9.8
    (hits,) = store.search(new_vectors[7:8], 1)
    assert hits[0].id == "030007"
    chosen = [record.id for record in records if record.label == "shoes" and record.size < 60]
    similarity = {id: queries[0] @ vectors[int(id[2:])] for id in chosen}
    (hits,) = store.search(queries[:1], 5, "label = 'shoes' AND size < 60 AND id < '02'")
    assert {hit.id for hit in hits} == set(sorted(chosen, key=lambda id: -similarity[id])[:5])
    for hit in hits:  # of the vectors as they are, however they are compressed
        assert hit.similarity == pytest.approx(similarity[hit.id], abs=1e-6)
    store.delete(chosen)
    store.finish()
    (hits,) = store.search(queries[:1], 50)
    assert not {hit.id for hit in hits} & set(chosen)


@needs("lancedb")
def test_parts_are_joined_when_there_are_many(tmp_path):
    store = open_store(str(tmp_path / "index"), about(), DIMENSION)
    parts = lambda: store._table.stats()["fragment_stats"]["num_fragments"]
    for seed in range(10):
        upsert(store, *rows(3, seed))
    store.finish()
    assert parts() == 10
    upsert(store, *rows(3, 10))
    store.finish()
    assert parts() == 1 and store.count() == 33
    upsert(store, *rows(30, 11))
    store.delete([record.id for record in rows(20, 11)[0]])
    store.finish()
    assert parts() == 1 and store.count() == 43


@needs("lancedb")
def test_damaged_files_are_named(tmp_path):
    address = tmp_path / "index"
    upsert(open_store(str(address), about(), DIMENSION), *rows(50))
    whole = tmp_path / "whole"
    shutil.copytree(address, whole)
    for file in (address / "images.lance/data").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    store = open_store(str(address))
    with pytest.raises(StoreError, match="could not be read: .* delete it and index"):
        store.search(rows(1)[1], 3)
    shutil.copytree(whole, address, dirs_exist_ok=True)
    for file in (address / "images.lance/_versions").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(StoreError, match="could not be opened: "):
        open_store(str(address))


@needs("lancedb")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of file sizes")
def test_a_full_disk_loses_nothing_that_was_written(tmp_path):
    import resource

    store = open_store(str(tmp_path / "index"), about(), DIMENSION)
    upsert(store, *rows(50))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(StoreError, match="could not be written: .*too large.* it goes on"):
            upsert(store, *rows(2000, seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.count() == 50
    upsert(store, *rows(2000, seed=1))
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
