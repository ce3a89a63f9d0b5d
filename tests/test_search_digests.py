"""Wrong bits in an index are noticed."""

import os
import random
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from cgd_jax.search import Index, StoreError, digests, filling
from tests.search_samples import folder_of_photographs, photograph, stand_in

pytest.importorskip("lancedb", reason="lancedb is not installed")


def filled(folder, name="index"):
    """Makes an index of several parts, with a deleted image, and a whitening."""
    photos, address = folder_of_photographs(folder / "photos", 30), folder / name
    filling.update(str(address), [photos], stand_in(), whiten=5)
    photograph(photos / "new.png", 99)
    (photos / "hats/000.png").unlink()
    filling.update(str(address), [photos], stand_in())
    closed(address)
    return address


def closed(address):
    """Does what the end of a process does to an index in milvus-lite."""
    if address.suffix:
        from cgd_jax.search.milvus_store import seal

        seal(str(address))


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return filled(tmp_path_factory.mktemp("digests"))


def answers(address, query):
    """All that can be asked of an index."""
    index = Index.open(address, stand_in())
    ids, vectors = index.vectors()
    queries = np.random.default_rng(0).normal(size=(5, 5))
    found = index.search_vectors(queries, 10), index.search(query, 40)
    return sorted((index.get(id), *map(float, v)) for id, v in zip(ids, vectors)), found  # noqa: B905


@pytest.mark.parametrize("name", ["index", pytest.param("index.db", marks=pytest.mark.slow)])
def test_no_flipped_bit_changes_an_answer_in_silence(tmp_path, name):
    pytest.importorskip("milvus_lite" if name.endswith(".db") else "lancedb")
    address, query = filled(tmp_path, name), photograph(tmp_path / "q.png", 7)
    whole = answers(shutil.copytree(address, tmp_path / "whole" / name), query)
    rng, reported = random.Random(0), Counter()
    files = sorted(file for file in address.rglob("*") if file.is_file() and file.stat().st_size)
    for i in range(50):
        # Every file at least once, and then the larger the more often.
        sizes = [file.stat().st_size for file in files]
        file = files[i] if i < len(files) else rng.choices(files, sizes)[0]
        copy = shutil.copytree(address, tmp_path / str(i) / name)
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (copy / file.relative_to(address)).write_bytes(data)
        try:
            assert answers(copy, query) == whole, file
            reported["changed nothing"] += 1
        except StoreError as error:
            assert "is damaged" in str(error) and str(copy) in str(error)
            reported["refused"] += 1
        closed(copy)
        shutil.rmtree(copy)
    assert reported["refused"] > 25
    print(f"50 flipped bits of {name}: {dict(reported)}")


@pytest.mark.slow
def test_a_file_of_milvus_lite_has_digests_when_its_process_has_ended(tmp_path):
    pytest.importorskip("milvus_lite")
    address = filled(tmp_path, "index.db")
    program = "import sys; from cgd_jax.search import Index; print(Index.open(sys.argv[1]).count())"
    for _ in range(2):  # what it changed at its end is what the next one finds
        run = [sys.executable, "-c", program, str(address)]
        done = subprocess.run(run, capture_output=True, text=True, check=True)
        assert done.stdout == "30\n" and (address / digests.LIST).exists()
    index = Index.open(address, stand_in())
    assert not (address / digests.LIST).exists()  # a process that is killed leaves none
    file = max(address.rglob("*.parquet"), key=lambda file: file.stat().st_size)
    data, status = bytearray(file.read_bytes()), file.stat()
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a disk does it
    assert index.count() == 30
    closed(address)
    digests._read.cache_clear()  # as in a new process
    for _ in range(2):
        with pytest.raises(StoreError, match=f"{file.name} is not what was written. Delete"):
            Index.open(address, stand_in())


@pytest.mark.parametrize("odd", ["pipe", "/dev/zero"])
def test_a_list_that_names_what_never_ends(address, tmp_path, odd):
    copy = shutil.copytree(address, tmp_path / "index")
    os.mkfifo(copy / "pipe")
    with open(copy / digests.LIST, "a") as file:
        file.write(f"{'0' * 64}  {odd}\n")
    with pytest.raises(StoreError, match=f"{odd} is not what was written"):
        Index.open(copy)


def test_writing_blesses_no_damage(address, tmp_path):
    copy = tmp_path / "index"
    shutil.copytree(address, copy)
    file = max(copy.glob("images.lance/data/*"), key=lambda file: file.stat().st_size)
    index = Index.open(copy, stand_in())  # has read the file before
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    digests.record(str(copy))
    photograph(tmp_path / "n.png", 5)
    update = lambda: filling.update(str(copy), [tmp_path])
    for use in (lambda: Index.open(copy), update, index.count):
        with pytest.raises(StoreError, match=f"{file.name} is not what was written. Delete"):
            use()
    shutil.copytree(address, tmp_path / "other")
    other = Index.open(tmp_path / "other", stand_in())
    before = (tmp_path / "other/digests.txt").read_text()
    other.add([tmp_path / "n.png"])
    assert set(before.splitlines()) < set((tmp_path / "other/digests.txt").read_text().splitlines())
    assert other.count() == Index.open(tmp_path / "other").count() == 31


def test_every_file_is_read_once(address, monkeypatch):
    digests._check.cache_clear()
    digests._read.cache_clear()
    index = Index.open(address, stand_in())
    first = digests._read.cache_info().misses
    for _ in range(3):
        index.count()
    Index.open(address)
    assert 0 < first == digests._read.cache_info().misses


def test_what_tidying_takes_away_is_no_damage(address, tmp_path):
    copy = tmp_path / "index"
    shutil.copytree(address, copy)
    for file in copy.glob("images.lance/_transactions/*"):
        file.unlink()
    assert Index.open(copy).count() == 30
    (copy / digests.LIST).unlink()  # as in an index of an earlier version
    assert Index.open(copy).count() == 30
