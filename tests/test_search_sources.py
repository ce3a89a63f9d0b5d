"""Sources that overlap, move, are away or cannot be read; files that no database expects."""

import os
import shutil
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from cgd_jax import network
from cgd_jax.data import decode
from cgd_jax.reports import plots
from cgd_jax.runtime import files as writing
from cgd_jax.search import Index, commands, images, queries
from cgd_jax.search.filling import update
from tests import quick
from tests.search_samples import folder_of_photographs, photograph, stand_in
from tests.test_search_indexing import content, numbers

pytest.importorskip("lancedb", reason="lancedb is not installed")

as_nobody = pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")


@pytest.fixture
def embedded(monkeypatch):
    """Counts the images that are embedded."""
    counted, read = [], images.read
    monkeypatch.setattr(images, "read", lambda *args: counted.append(1) or read(*args))
    return counted


@pytest.fixture
def photos(tmp_path):
    """Returns photos/a/x/*.png and photos/b/*.png."""
    for i in range(4):
        photograph(tmp_path / "photos/a/x" / f"{i}.png", i)
        photograph(tmp_path / "photos/b" / f"{i}.png", 10 + i)
    return tmp_path / "photos"


def filled(address, *sources, **options):
    return numbers(update(str(address), list(sources), stand_in(), **options))


ORDERS = [
    [("photos",), ("photos/a",), ("photos/a/x",), ("photos",)],
    [("photos/a/x",), ("photos/a",), ("photos",), ("photos/a",)],
    [("photos/b", "photos/a"), ("photos/a/x", "photos")],
    [("photos/a/x", "photos", "photos/a")],
    [("photos", "photos/b/"), ("photos/../photos/a",)],
]


@pytest.mark.parametrize("order", quick.first(ORDERS, 2))
def test_folders_in_each_other_are_one_source(photos, tmp_path, order, embedded):
    for i, sources in enumerate(order):
        filled(tmp_path / "index", *(f"{tmp_path}/{source}" for source in sources))
        if i == len(order) - 2:
            (photos / "a/x/0.png").unlink()
    assert len(embedded) == 8
    if len(order) == 1:
        (photos / "a/x/0.png").unlink()
    # The last command looked at all, or the next one does; no ghost is left.
    filled(tmp_path / "index", photos)
    filled(tmp_path / "anew", photos)
    assert content(tmp_path / "index") == content(tmp_path / "anew")
    assert Index.open(tmp_path / "index").labels() == {"a": 3, "b": 4}
    # Nothing flips when either is indexed again.
    for source in (photos / "a", photos, photos / "a/x"):
        count = 7 if source == photos else 3
        assert filled(tmp_path / "index", source) == (0, 0, 0, count, 0)
    assert content(tmp_path / "index") == content(tmp_path / "anew") and len(embedded) == 8 + 7


def test_what_vanishes_below_either_of_two_folders_is_removed(photos, tmp_path):
    filled(tmp_path / "index", photos)
    filled(tmp_path / "index", photos / "a")
    (photos / "a/x/0.png").unlink()
    assert filled(tmp_path / "index", photos) == (0, 0, 1, 7, 0)
    (photos / "a/x/1.png").unlink()
    (photos / "b/1.png").unlink()
    assert filled(tmp_path / "index", photos / "a") == (0, 0, 1, 2, 0)
    assert filled(tmp_path / "index", photos) == (0, 0, 1, 5, 0)


def test_a_list_says_more_than_a_folder(photos, tmp_path):
    """In whatever order; what it no longer names is the folder's again."""
    (tmp_path / "list.csv").write_text("path,label\nphotos/b/0.png,cap\nphotos/b/1.png,cap\n")
    labels = {"a": 4, "b": 2, "cap": 2}
    for name, order in {
        "one": [photos, tmp_path / "list.csv", photos, photos / "b", tmp_path / "list.csv"],
        "two": [tmp_path / "list.csv", photos],
    }.items():
        for source in order:
            filled(tmp_path / name, source)
        assert Index.open(tmp_path / name).labels() == labels
    filled(tmp_path / "three", tmp_path / "list.csv", photos)
    assert Index.open(tmp_path / "three").labels() == labels
    (tmp_path / "list.csv").write_text("path,label\nphotos/b/0.png,cap\n")
    filled(tmp_path / "three", tmp_path / "list.csv", photos)
    assert Index.open(tmp_path / "three").labels() == {"a": 4, "b": 3, "cap": 1}


def test_archives_in_a_folder_are_sources_of_their_own(photos, tmp_path):
    with zipfile.ZipFile(photos / "c.zip", "w") as archive:
        archive.write(photos / "a/x/0.png", "hats/0.png")
        archive.write(photos / "a/x/1.png", "hats/1.png")
    filled(tmp_path / "index", photos / "c.zip")
    filled(tmp_path / "index", photos)
    index = Index.open(tmp_path / "index")
    assert index.labels() == {"a": 4, "b": 4, "hats": 2}
    with zipfile.ZipFile(photos / "c.zip", "w") as archive:
        archive.write(photos / "a/x/1.png", "hats/1.png")
    assert filled(tmp_path / "index", photos / "c.zip")[2] == 1
    assert index.labels() == {"a": 4, "b": 4, "hats": 1}


def test_what_was_added_alone_is_not_of_a_folder_that_lacks_it(photos, tmp_path):
    index = Index.create(tmp_path / "index", stand_in())
    image = Image.new("RGB", (9, 9))
    (kept,) = index.add([image])
    (elsewhere,) = index.add([photograph(tmp_path / "photos2/z.png", 50)])
    assert filled(tmp_path / "index", photos) == (8, 0, 0, 0, 0)
    assert index.get(kept) and index.get(elsewhere) and index.count() == 10


@pytest.mark.parametrize(
    "new, database",
    [("photos/c", ""), ("photos/b/deeper", ""), ("elsewhere", ""), ("photos/c", ".db")],
)
def test_moved_files_keep_their_vectors(photos, tmp_path, new, database, embedded):
    pytest.importorskip("milvus_lite" if database else "lancedb")
    index, anew = tmp_path / f"index{database}", tmp_path / f"anew{database}"
    shutil.copy(photos / "a/x/0.png", photos / "a/x/copy.png")  # two of one content move too
    sources = [photos, photograph(tmp_path / "elsewhere/1.png", 60).parent]
    filled(index, *sources)
    embedded.clear()
    (tmp_path / new).mkdir(exist_ok=True)
    (photos / "a/x").rename(tmp_path / new / "moved")
    (photos / "b/2.png").rename(photos / "b/renamed.png")
    assert filled(index, *sources) == (6, 0, 6, 4, 0) and not embedded
    filled(anew, *sources)
    assert content(index) == content(anew)


def test_files_that_change_places_and_copies(photos, tmp_path, embedded):
    filled(tmp_path / "index", photos)
    embedded.clear()
    first, second = photos / "b/0.png", photos / "b/1.png"
    for old, new in ((first, "tmp"), (second, first), (photos / "b/tmp", second)):
        old.rename(photos / "b" / new)
    shutil.copy(photos / "b/3.png", photos / "b/again.png")
    assert filled(tmp_path / "index", photos) == (1, 2, 0, 6, 0) and len(embedded) == 2
    filled(tmp_path / "anew", photos)
    assert content(tmp_path / "index") == content(tmp_path / "anew")


@pytest.mark.parametrize("how", ["empty", "gone", "a broken link", "deeper"])
@pytest.mark.parametrize("through", ["folder", "list"])
def test_a_disk_that_is_away_removes_nothing_without_asking(photos, tmp_path, how, through, caplog):
    source = photos
    if through == "list":
        source = tmp_path / "list.csv"
        paths = sorted(photos.rglob("*.png"))
        source.write_text("path,label\n" + "".join(f"{p},{p.parent.name}\n" for p in paths))
    disk = photos / "a/x" if how != "deeper" else photos / "a"
    if how == "a broken link":
        disk.rename(tmp_path / "disk")
        disk.symlink_to(tmp_path / "disk")
    filled(tmp_path / "index", source)
    before = content(tmp_path / "index")
    (tmp_path / "disk" if how == "a broken link" else disk).rename(tmp_path / "away")
    if how in ("empty", "deeper"):
        disk.mkdir()
    (photos / "b/0.png").unlink()  # as usual
    assert filled(tmp_path / "index", source)[:4] == (0, 0, 1, 3)
    assert "4 images stay in the index whose folders are gone, empty or " in caplog.text
    assert f"{photos}/a/x/0.png: a disk may be away. --prune removes them." in caplog.text
    assert Index.open(tmp_path / "index").count() == 7
    if how in ("empty", "deeper"):
        disk.rmdir()
    (tmp_path / "away").rename(tmp_path / "disk" if how == "a broken link" else disk)
    assert filled(tmp_path / "index", source)[:4] == (0, 0, 0, 7)
    assert content(tmp_path / "index").items() < before.items()
    shutil.rmtree(photos / "a", ignore_errors=True)
    assert filled(tmp_path / "index", source, prune=True)[:4] == (0, 0, 4, 3)
    assert Index.open(tmp_path / "index").count() == 3


def test_a_copy_that_is_looked_at_again_moves_nothing(photos, tmp_path):
    shutil.copy(photos / "a/x/0.png", photos / "b/same.png")
    filled(tmp_path / "index", photos)
    (photos / "a/x").rename(tmp_path / "away")
    os.utime(photos / "b/same.png", ns=(0, 10**9))
    assert filled(tmp_path / "index", photos) == (0, 0, 0, 5, 0)
    assert Index.open(tmp_path / "index").count() == 9


@as_nobody
def test_what_cannot_be_read_is_said_and_kept(photos, tmp_path, monkeypatch, caplog):
    """A folder, a file, and a file that cannot even be looked at; the rest is indexed."""
    filled(tmp_path / "index", photos)
    photograph(photos / "b/new.png", 70)
    scandir, read = os.scandir, images.read_file
    listdir = os.listdir

    def refusing(function, *names):
        def call(path, *args, **options):
            if str(path).endswith(names):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *args, **options)

        return call

    monkeypatch.setattr(os, "scandir", refusing(scandir, "a/x"))
    monkeypatch.setattr(os, "listdir", refusing(listdir, "a/x"))
    monkeypatch.setattr(images, "read_file", refusing(read, "b/0.png"))
    os.utime(photos / "b/0.png", ns=(0, 10**9))
    record_of = images.record_of
    monkeypatch.setattr(images, "record_of", refusing(record_of, "b/1.png"))
    monkeypatch.setattr(images, "read_file", refusing(images.read_file, "b/1.png"))
    changes = update(str(tmp_path / "index"), [photos], stand_in())
    assert numbers(changes) == (1, 0, 0, 2, 3)
    reasons = {os.path.relpath(path, photos): reason for path, reason in changes.skipped}
    assert reasons == dict.fromkeys(["a/x", "b/0.png", "b/1.png"], "Permission denied")
    assert f"Left out: {photos}/a/x: Permission denied." in caplog.text
    assert Index.open(tmp_path / "index").count() == 9
    found = queries.ask(Index.open(tmp_path / "index", stand_in()), [str(photos)], 1)
    assert len(found.answers) == 5 and found.skipped[0] == (f"{photos}/a/x", "Permission denied")
    monkeypatch.undo()
    assert filled(tmp_path / "index", photos) == (0, 0, 0, 9, 0)
    # What is broken, rather than out of reach, is removed.
    (photos / "b/0.png").write_bytes(b"")
    assert filled(tmp_path / "index", photos) == (0, 0, 1, 8, 1)


YEARS = [-(2**70), -(2**63) - 1, -1, 0, 2**63 - 1, 2**63, 2**80]


@pytest.mark.parametrize("database", ["index", "index.db"])
def test_any_date_of_a_file_can_be_kept(tmp_path, database, monkeypatch):
    pytest.importorskip("milvus_lite" if database.endswith(".db") else "lancedb")
    dates = dict(zip("abcdefg", YEARS, strict=True))
    for i, name in enumerate(dates):
        photograph(tmp_path / "photos" / f"{name}.png", i)
    record_of = images.record_of

    def dated(file, *args):
        return record_of(file, *args[:3], dates[file.stem])

    monkeypatch.setattr(images, "record_of", dated)
    assert filled(tmp_path / database, tmp_path / "photos") == (7, 0, 0, 0, 0)
    assert filled(tmp_path / database, tmp_path / "photos") == (0, 0, 0, 7, 0)
    monkeypatch.undo()
    for name in "ab":  # what the file system itself takes
        os.utime(tmp_path / "photos" / f"{name}.png", ns=(0, 2**63 + 10**9 * ord(name)))
    filled(tmp_path / database, tmp_path / "photos")
    assert len(Index.open(tmp_path / database, stand_in())) == 7


def test_nothing_of_ours_is_an_image(tmp_path, monkeypatch):
    """The index, another index, what search draws, and other pictures of this program."""
    photos = folder_of_photographs(tmp_path / "photos", 4)
    monkeypatch.chdir(photos)
    monkeypatch.setattr(network, "open_network", lambda *args: stand_in())
    assert filled("runs/index", photos) == (4, 0, 0, 0, 0)
    assert filled("other/index", photos)[0] == 4
    commands.search_index("runs/index", ["hats/000.png"], stand_in())
    commands.search_index("runs/index", ["hats/000.png"], stand_in(), picture="hats/found.png")
    commands.search_index("runs/index", None, stand_in(), similarity=0.01)
    with plots.figure("curve.png", 2, 2):
        pass
    writing.write_picture("sprite.png", Image.new("RGB", (9, 9)))
    drawn = {"search.png", "duplicates.png", "found.png", "curve.png", "sprite.png"}
    assert {file.name for file in photos.rglob("*.png")} > drawn
    changes = update("runs/index", [photos], stand_in())
    assert numbers(changes)[:4] == (0, 0, 0, 4)
    monkeypatch.setattr(Index, "network", None)  # which up-to-date images do not need
    assert numbers(update("runs/index", [photos])) == numbers(changes)
    monkeypatch.undo()
    monkeypatch.chdir(photos)
    reasons = {os.path.basename(path): reason for path, reason in changes.skipped}
    ours = {
        name for name, reason in reasons.items() if reason == "a picture that this program drew"
    }
    assert ours == drawn
    assert set(reasons) - drawn == {"skipped.csv", "digests.txt"}  # of the other index
    with Image.open(photos / "hats/000.png") as image:  # a photograph that some program wrote
        image.save(photos / "hats/saved.png")
    assert filled("runs/index", photos)[0] == 1


def test_every_image_is_decoded_once(tmp_path, monkeypatch):
    loads = []
    for i, (name, size) in enumerate({"a.png": (300, 200), "b.webp": (50, 40)}.items()):
        photograph(tmp_path / "photos" / name, i, size)
    opened = decode._opened
    monkeypatch.setattr(decode, "_opened", lambda data: loads.append(1) or opened(data))
    filled(tmp_path / "index", tmp_path / "photos")
    assert len(loads) == 2
    for side in (8, 192, 300):
        pixels, found = images.read((tmp_path / "photos/a.png").read_bytes(), side)
        assert pixels.shape == (side, side, 3) and (found["width"], found["height"]) == (300, 200)
    assert len(loads) == 5 and np.ptp(pixels) > 0
