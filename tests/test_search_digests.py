"""Wrong bits in an index are noticed."""

import random
import shutil

import numpy as np
import pytest

from cgd_jax.search import Index, StoreError, digests, indexing
from tests.search_samples import folder_of_photographs, photograph, stand_in

pytest.importorskip("lancedb", reason="lancedb is not installed")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Several parts, a deleted image, a whitening."""
    folder = tmp_path_factory.mktemp("digests")
    photos = folder_of_photographs(folder / "photos", 30)
    address = folder / "index"
    indexing.update(str(address), [photos], stand_in(), whiten=5)
    photograph(photos / "new.png", 99)
    (photos / "hats/000.png").unlink()
    indexing.update(str(address), [photos], stand_in())
    return address


def answers(address):
    """All that can be asked of an index."""
    index = Index.open(address, stand_in())
    ids, vectors = index.vectors()
    queries = np.random.default_rng(0).normal(size=(5, 5))
    found = index.search_vectors(queries, 10), index.search(photograph(address / "q.png", 7), 40)
    return sorted((index.get(id), *map(float, v)) for id, v in zip(ids, vectors)), found  # noqa: B905


def test_no_flipped_bit_changes_an_answer_in_silence(address, tmp_path):
    whole, rng, reported = answers(address), random.Random(0), 0
    files = sorted(file for file in address.rglob("*") if file.is_file() and file.stat().st_size)
    for i in range(50):
        # Every file at least once, and then the larger the more often.
        sizes = [file.stat().st_size for file in files]
        file = files[i] if i < len(files) else rng.choices(files, sizes)[0]
        copy = tmp_path / str(i)
        shutil.copytree(address, copy)
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (copy / file.relative_to(address)).write_bytes(data)
        try:
            assert answers(copy) == whole, file
        except StoreError as error:
            assert "is damaged" in str(error) and str(copy) in str(error)
            reported += 1
        shutil.rmtree(copy)
    assert reported > 25


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
    update = lambda: indexing.update(str(copy), [tmp_path])
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
