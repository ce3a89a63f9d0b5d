"""An index follows its files: whatever changes, and wherever indexing is interrupted."""

import csv
import json
import os
import shutil
import subprocess
import sys
import tarfile
import unicodedata
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from cgd_jax.runtime.errors import InputError
from cgd_jax.search import embedding, images, indexing
from cgd_jax.search.filling import update
from cgd_jax.search.index import Index
from cgd_jax.search.stores import BusyError, StoreError
from tests.search_samples import folder_of_photographs, photograph, stand_in, vectors_of

pytest.importorskip("lancedb", reason="lancedb is not installed")

ROOT = Path(__file__).parents[1]


def numbers(changes):
    return (*changes[:4], len(changes.skipped))


def content(address):
    """Everything that an index holds of every path."""
    index = Index.open(address, stand_in())
    ids, vectors = index.vectors()
    return {
        index.get(id)._replace(modified=0): tuple(np.round(vector, 4))
        for id, vector in zip(ids, vectors, strict=True)
    }


@pytest.fixture
def photos(tmp_path):
    return folder_of_photographs(tmp_path / "photos")


def test_what_is_stored(photos, tmp_path):
    address = str(tmp_path / "index")
    network = stand_in()
    assert numbers(update(address, [photos], network)) == (12, 0, 0, 0, 0)
    index = Index.open(address, network)
    assert index.count() == 12 and index.labels() == {"hats": 6, "shoes": 6}
    files = sorted(photos.rglob("*.png"))
    ids, vectors = index.vectors()
    by_path = {index.get(id).path: (index.get(id), vectors[ids.index(id)]) for id in ids}
    for file, expected in zip(files, vectors_of(network, files), strict=True):
        record, vector = by_path[str(file)]
        assert record.id.isalnum() and record.label == file.parent.name
        assert (record.size, record.width, record.height) == (file.stat().st_size, 24, 16)
        np.testing.assert_allclose(vector, expected, atol=1e-6)


def test_only_what_changed_is_embedded(photos, tmp_path, monkeypatch):
    address = str(tmp_path / "index")
    network, counting = stand_in(), stand_in()
    embedded = []

    def embed(images):
        embedded.append(len(images))
        return network.embed_batch(images)

    counting.embed_batch = embed

    def run(*sources):
        embedded.clear()
        return numbers(update(address, sources or [photos], counting))

    assert run() == (12, 0, 0, 0, 0) and embedded
    before = content(address)
    assert run() == (0, 0, 0, 12, 0) and not embedded
    # Another time of change, the same content.
    os.utime(photos / "hats/000.png", ns=(0, 10**9))
    assert run() == (0, 0, 0, 12, 0) and not embedded
    assert content(address) == before
    read = []
    monkeypatch.setattr(images, "hash_of", lambda data: read.append(data))
    assert run() == (0, 0, 0, 12, 0) and not read  # its time was written down
    monkeypatch.undo()
    # The same size and another content; vanished; new; moved to another class.
    changed = photos / "hats/002.png"
    data = bytearray(photograph(tmp_path / "other.png", 99).read_bytes())
    size = max(len(data), changed.stat().st_size)
    changed.write_bytes(changed.read_bytes().ljust(size, b"\0"))
    assert run() == (0, 1, 0, 11, 0)
    changed.write_bytes(data.ljust(size, b"\0"))
    os.utime(changed, ns=(0, 2 * 10**9))
    (photos / "shoes/001.png").unlink()
    photograph(photos / "shoes/new.png", 77)
    (photos / "hats/004.png").rename(photos / "shoes/004.png")
    assert run() == (2, 1, 2, 9, 0) and embedded
    undisturbed = str(tmp_path / "undisturbed")
    update(undisturbed, [photos], network)
    assert content(address) == content(undisturbed)


def test_an_unchanged_folder_needs_no_jax(photos, tmp_path):
    address = str(tmp_path / "index")
    update(address, [photos], stand_in())
    script = "import sys; from cgd_jax.search import commands as c; c.fill_index(sys.argv[1], "
    script += "sys.argv[2:]); print({'jax', 'flax', 'scipy'} & sys.modules.keys())"
    command = [sys.executable, "-c", script, address, str(photos)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert " 12 unchanged" in run.stdout and run.stdout.endswith("set()\n"), run.stderr


def test_files_that_cannot_be_used_are_listed(photos, tmp_path, caplog):
    (photos / "hats/broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    (photos / "hats/empty.png").touch()
    (photos / "notes.txt").write_text("no image")
    (photos / ".hidden.png").write_text("not looked at")
    (photos / "hats/\x1b[2J.png").touch()
    address = tmp_path / "index"
    changes = update(str(address), [photos], stand_in())
    assert numbers(changes) == (12, 0, 0, 0, 4)
    with open(address / "skipped.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["path", "reason"]
    assert sorted((Path(path).name, reason) for path, reason in rows) == sorted(
        (Path(path).name, reason) for path, reason in changes.skipped
    )
    reasons = {Path(path).name: reason for path, reason in rows}
    assert reasons["empty.png"] == "empty file" and "name" in reasons["notes.txt"]
    assert f"Left out: {photos}/hats/empty.png: empty file." in caplog.text
    assert r"hats/\x1b[2J.png: empty" in caplog.text and "\x1b" not in caplog.text
    # An image that breaks is removed, one that is mended comes.
    (photos / "hats/000.png").write_bytes(b"")
    photograph(photos / "hats/empty.png", 5)
    assert numbers(update(str(address), [photos], stand_in())) == (1, 0, 1, 11, 4)


def test_archives_and_lists(photos, tmp_path):
    address = str(tmp_path / "index")
    network = stand_in()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in photos.rglob("*.png"):
            archive.write(file, file.relative_to(photos.parent / "photos"))
    with tarfile.open(tmp_path / "b.tgz", "w:gz") as archive:
        archive.add(photos / "hats", "train/hats")
    (tmp_path / "c.csv").write_text(
        "path,label\nphotos/hats/000.png,cap\nphotos/none.png,cap\n", encoding="utf-8"
    )
    sources = [tmp_path / name for name in ("a.zip", "b.tgz", "c.csv")]
    assert numbers(update(address, sources, network)) == (12 + 6 + 1, 0, 0, 0, 1)
    index = Index.open(address, network)
    assert index.labels() == {"cap": 1, "hats": 12, "shoes": 6}
    assert index.count(f"path = '{tmp_path}/a.zip/hats/000.png' AND label = 'hats'") == 1
    assert index.count(f"path = '{tmp_path}/b.tgz/train/hats/000.png'") == 1
    assert numbers(update(address, sources, network)) == (0, 0, 0, 19, 1)
    # Another label is written down; what another source has is left alone.
    (tmp_path / "c.csv").write_text("path,label\nphotos/hats/000.png,hood\n", encoding="utf-8")
    assert numbers(update(address, sources[2:], network)) == (0, 0, 0, 1, 0)
    assert index.labels() == {"hats": 12, "hood": 1, "shoes": 6}
    assert not list(tmp_path.glob("incomplete*"))


def test_a_label_has_one_form(tmp_path):
    """Accents are letters of their own in names from macOS."""
    index = tmp_path / "index"
    for i, form in enumerate(["NFC", "NFD"]):
        name = unicodedata.normalize(form, "Zürich")
        photograph(tmp_path / form / name / "a.png", i)
        update(str(index), [tmp_path / form], stand_in())
        Index.open(index, stand_in()).add([photograph(tmp_path / f"{i}.png", i)], [name])
    opened = Index.open(index, stand_in())
    assert opened.labels() == {unicodedata.normalize("NFC", "Zürich"): 4}
    for form in ("NFC", "NFD"):
        where = unicodedata.normalize(form, "label = 'Zürich'")
        assert opened.count(where) == len(opened.search(np.ones(16), where=where)) == 4
        assert len(opened.vectors(where)[0]) == 4
        assert opened.count(unicodedata.normalize(form, "path LIKE '%/Zürich/%'")) == 1


def test_sources_that_are_none(photos, tmp_path):
    address = str(tmp_path / "index")
    update(address, [photos], stand_in())
    with pytest.raises(InputError, match="--images=.*gone: there is no such folder"):
        update(address, [tmp_path / "gone"], stand_in())
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no image.*Nothing was changed"):
        update(address, [tmp_path / "empty"], stand_in())
    shutil.rmtree(photos)
    photos.mkdir()
    with pytest.raises(InputError, match="To empty an index|to empty an index, delete it"):
        update(address, [photos], stand_in())
    assert Index.open(address).count() == 12
    with pytest.raises(InputError, match="neither a folder, nor a CSV, nor an archive"):
        update(address, [Path(__file__)], stand_in())


def test_an_index_stays_with_its_network_and_numbers(photos, tmp_path):
    address = str(tmp_path / "index")
    update(address, [photos], stand_in())
    other = stand_in("another", seed=7)
    (photos / "hats/000.png").unlink()
    with pytest.raises(InputError, match="made with the network stand-in; another is"):
        update(address, [photos], other)
    with pytest.raises(InputError, match="holds vectors in float32, not whitened"):
        update(address, [photos], stand_in(), precision="float16")
    with pytest.raises(InputError, match="holds vectors in float32, not whitened"):
        update(address, [photos], stand_in(), whiten=4)
    with pytest.raises(InputError, match="not whitened and not compressed, which stays as it is"):
        update(address, [photos], stand_in(), compress="pq")
    assert Index.open(address).count() == 12


def test_a_second_writer_is_refused(photos, tmp_path):
    address = tmp_path / "index"
    address.mkdir()
    with FileLock(address / ".lock"):
        with pytest.raises(BusyError, match="Another process writes to the index"):
            update(str(address), [photos], stand_in())
    assert numbers(update(str(address), [photos], stand_in())) == (12, 0, 0, 0, 0)
    with FileLock(address / ".lock"):
        index = Index.open(address, stand_in())
        with pytest.raises(BusyError, match="Another process writes"):
            index.remove(index.vectors()[0][:1])
        with pytest.raises(BusyError, match="Another process writes"):
            index.add([photos / "hats/000.png"])
        assert index.search(photos / "hats/000.png", 1)[0].path == str(photos / "hats/000.png")


def test_several_processes_fill_one_index(photos, tmp_path, monkeypatch):
    import threading

    address = str(tmp_path / "index")
    barrier = threading.Barrier(3)
    monkeypatch.setattr(indexing, "meet", lambda share, where: barrier.wait(timeout=30))
    monkeypatch.setattr(indexing, "WRITE_EVERY", 1)
    done = [None] * 3

    def run(i):
        try:
            done[i] = update(address, [photos], stand_in(), share=(i, 3))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # By hashes of paths, which differ from run to run, one of three may have nothing to do.
    added = [changes.added for changes in done]
    assert sum(added) == 12 and max(added) < 12
    monkeypatch.undo()
    undisturbed = str(tmp_path / "undisturbed")
    update(undisturbed, [photos], stand_in())
    assert content(address) == content(undisturbed)


def test_an_interrupted_run_goes_on(photos, tmp_path, monkeypatch):
    """Each attempt fails at another write, as when the disk is full, until one succeeds."""
    from cgd_jax.search.lancedb_store import LanceStore

    address = str(tmp_path / "index")
    monkeypatch.setattr(embedding, "enough", lambda: 2)
    monkeypatch.setattr(indexing, "WRITE_EVERY", 2)
    upsert = LanceStore.upsert
    counts = []
    for _ in range(20):
        left = [1]

        def fails_soon(store, columns, left=left):
            if not left[0]:
                raise StoreError("no space left on device")
            left[0] -= 1
            upsert(store, columns)

        monkeypatch.setattr(LanceStore, "upsert", fails_soon)
        try:
            update(address, [photos], stand_in())
        except StoreError:
            counts.append(Index.open(address).count())
        else:
            break
    assert counts == [2, 4, 6, 8, 10]
    monkeypatch.undo()
    undisturbed = str(tmp_path / "undisturbed")
    update(undisturbed, [photos], stand_in())
    assert content(address) == content(undisturbed)


SERVES_AND_INDEXES = """
import sys, threading, time
import uvicorn
from cgd_jax.search import Index, embedding, filling, indexing
from cgd_jax.serve import app, command
from tests.search_samples import stand_in

address, photos = sys.argv[1:]
application = app.create_app(Index.open(address, stand_in()))
listener = command.listen("127.0.0.1", 0)
server = uvicorn.Server(uvicorn.Config(application, log_level="error"))
threading.Thread(target=server.run, args=([listener],), daemon=True).start()
while not server.started:
    time.sleep(0.01)
print(listener.getsockname()[1], flush=True)

def embed(images):
    time.sleep(0.02)
    return stand_in().embed_batch(images)

embedding.enough, indexing.WRITE_EVERY = lambda: 1, 1
slow = stand_in()
slow.embed_batch = embed
filling.update(address, [photos], slow)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_while_it_serves_and_indexes(tmp_path):
    """What was there is answered as before, and the next run writes the rest."""
    pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    testclient = pytest.importorskip("fastapi.testclient", reason="fastapi is not installed")
    from cgd_jax.serve.app import create_app

    address, photos = tmp_path / "index", tmp_path / "photos"
    for i in range(20):
        query = photograph(photos / "old" / f"{i:03}.png", i)
    update(str(address), [photos], stand_in())
    for i in range(20, 60):
        photograph(photos / "new" / f"{i:03}.png", i)
    before = content(address)
    search, data = "/search?label=old&k=7", query.read_bytes()
    command = [sys.executable, "-c", SERVES_AND_INDEXES, str(address), str(photos)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            server = f"http://127.0.0.1:{process.stdout.readline().strip()}"
            ask = lambda: json.load(urllib.request.urlopen(server + search, data))["hits"]
            first = ask()
            while len(list((address / "images.lance/_versions").iterdir())) < 8:
                assert ask() == first
        finally:
            process.kill()
    after = content(address)
    done = len(after)
    assert 20 < done < 60 and before.items() <= after.items()
    client = testclient.TestClient(create_app(Index.open(address, stand_in())))
    again = client.post(search, content=data, headers={"Host": "localhost"})
    assert len(first) == 7 and again.json()["hits"] == first
    assert numbers(update(str(address), [photos], stand_in())) == (60 - done, 0, 0, done, 0)
    undisturbed = str(tmp_path / "undisturbed")
    update(undisturbed, [photos], stand_in())
    assert content(address) == content(undisturbed)


def test_whitening_is_learned_and_applied(tmp_path):
    from cgd_jax import rerank

    photos = folder_of_photographs(tmp_path / "photos", 40)
    network = stand_in()
    address = str(tmp_path / "index")
    with pytest.raises(InputError, match="--whiten=16: must be below the dimension"):
        update(address, [photos], network, whiten=16)
    update(address, [photos], network, whiten=5, precision="float16")
    index = Index.open(address, network)
    assert index.info[3] == index.info.dimension == 5 and index.info.whitened_from == 16
    assert index.info.precision == "float16"
    files = sorted(photos.rglob("*.png"))
    plain = vectors_of(network, files)
    expected = rerank.whiten(plain, *rerank.learn_whitening(plain, 5))
    ids, vectors = index.vectors()
    assert vectors.shape == (40, 5)
    order = {index.get(id).path: vector for id, vector in zip(ids, vectors, strict=True)}
    found = np.stack([order[str(file)] for file in files])
    # Components are known up to their signs.
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=5e-3)
    assert index.search(files[3], 1)[0].path == str(files[3])
    assert numbers(update(address, [photos], network)) == (0, 0, 0, 40, 0)


def test_whitening_by_pairs_learns_from_what_shares_a_folder(tmp_path, monkeypatch):
    from cgd_jax import rerank

    photos, address = folder_of_photographs(tmp_path / "photos", 40), str(tmp_path / "index")
    network = stand_in()
    update(address, [photos], network, whiten=5, whitening="pairs")
    files = sorted(photos.rglob("*.png"))
    plain = vectors_of(network, files)
    ids, vectors = Index.open(address, network).vectors()
    index = Index.open(address, network)
    found = {index.get(id).path: vector for id, vector in zip(ids, vectors, strict=True)}
    # What differs within folders is white, whatever pairs of a folder are taken.
    learned = []
    monkeypatch.setattr(embedding, "SAMPLE", 20)  # one of both folders
    keep = rerank.matching_pairs
    monkeypatch.setattr(rerank, "matching_pairs", lambda x: learned.append(x) or keep(x))
    update(str(tmp_path / "smaller"), [photos], network, whiten=5, whitening="pairs")
    assert len(set(learned[0])) == 1 and len(learned[0]) == 20
    mean, projection = index.whitening
    expected = rerank.whiten(plain, mean, projection)
    for file, vector in zip(files, expected, strict=True):
        np.testing.assert_allclose(found[str(file)], vector, atol=1e-5)
    labels = np.array([file.parent.name for file in files])
    within = (plain - np.stack([plain[labels == x].mean(0) for x in labels])) @ projection
    assert np.linalg.cond(within.T @ within) < np.linalg.cond(np.cov(plain.T)[:5, :5])
    assert index.info.whitened_by == "pairs"
    with pytest.raises(InputError, match="whitened by pairs to 5 dimensions and not"):
        update(address, [photos], network, whiten=5, whitening="pca")
    alone = tmp_path / "alone"
    for i in range(8):
        photograph(alone / str(i) / "a.png", i)
    with pytest.raises(InputError, match="no two images share a label"):
        update(str(tmp_path / "other"), [alone], network, whiten=5, whitening="pairs")


def test_a_pipe_with_the_name_of_an_image_is_left_out(tmp_path):
    """Reading it would wait for ever."""
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="^not a file$"):
        images.content_of(tmp_path / "a.png")
