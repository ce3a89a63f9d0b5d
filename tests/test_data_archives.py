"""Archives: every form unpacks alike, dangerous and damaged ones are refused whole."""

import bz2
import io
import lzma
import os
import shutil
import stat
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from cgd_jax.data import archives, cars196, image_list, roxford5k
from cgd_jax.runtime.errors import InputError
from tests.dataset_samples import pack, write

FILES = {
    "top/a b/ü.JPG": b"one",
    "top/list.txt": b"two",
    "top/._list.txt": b"resource fork",
    "__MACOSX/top/list.txt": b"resource fork",
}


@pytest.mark.parametrize("name", ["x.zip", "x.ZIP", "x.tar", "x.tgz", "x.tar.gz"])
def test_archives_unpack_and_go_away(tmp_path, name):
    archive = pack(tmp_path / name, FILES)
    with archives.unpacked(archive, tmp_path / "scratch") as folder:
        found = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        assert found == {"top/a b/ü.JPG": b"one", "top/list.txt": b"two"}
    assert not list((tmp_path / "scratch").iterdir())


def test_a_folder_is_used_as_it_is(tmp_path):
    with archives.unpacked(tmp_path, tmp_path / "scratch") as folder:
        assert folder == tmp_path
    assert tmp_path.exists() and not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("name", ["x.zip", "x.tgz"])
@pytest.mark.parametrize(
    "member", ["../evil", "a/../../evil", "/tmp/evil", "C:/evil", "..\\evil", "a/..\\..\\evil"]
)
def test_members_that_point_outside_are_refused(tmp_path, name, member):
    archive = pack(tmp_path / "in" / name, {"good": b"1", member: b"2"})
    with pytest.raises(ValueError, match="refused.*evil"):
        with archives.unpacked(archive, tmp_path / "scratch"):
            pytest.fail("unpacked")
    assert not list((tmp_path / "scratch").iterdir())
    assert not list(tmp_path.rglob("evil*"))


def link(name, target, kind=tarfile.SYMTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def zip_link(name, target):
    member = zipfile.ZipInfo(name)
    member.create_system, member.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return member, target


@pytest.mark.parametrize("name", ["x.tar", "x.zip"])
def test_links_are_unpacked_as_copies_or_left_out(tmp_path, name, caplog):
    archive = pack(tmp_path / name, {"a/1.jpg": b"one", "b/2.jpg": b"two"})
    links = {
        "a/inside.jpg": "../b/2.jpg",
        "absolute.jpg": "/etc/passwd",
        "outside.jpg": "../../etc/passwd",
        "nowhere.jpg": "gone.jpg",
        "folder": "a",
    }
    if name == "x.zip":
        with zipfile.ZipFile(archive, "a") as opened:
            for member in links.items():
                opened.writestr(*zip_link(*member))
    else:
        with tarfile.open(archive, "a") as opened:
            for member in links.items():
                opened.addfile(link(*member))
            opened.addfile(link("hard.jpg", "a/1.jpg", tarfile.LNKTYPE))
            opened.addfile(link("pipe.jpg", "", tarfile.FIFOTYPE))
    with archives.unpacked(archive, tmp_path / "scratch") as folder:
        found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.glob("*/*")}
        assert found == {"a/1.jpg": b"one", "b/2.jpg": b"two", "a/inside.jpg": b"two"}
        hard = {"hard.jpg": b"one"} if name == "x.tar" else {}
        assert {p.name: p.read_bytes() for p in folder.glob("*.jpg")} == hard
        assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert "4 members could not be unpacked" in caplog.text
    assert all(repr(link) in caplog.text for link in links if link != "a/inside.jpg")
    assert ("pipe.jpg" in caplog.text) == (name == "x.tar")


def test_zips_made_on_windows(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, content in {"cat\\": b"", "cat\\1.jpg": b"1", "dog\\sub\\2.jpg": b"2"}.items():
            member = zipfile.ZipInfo("placeholder")
            member.filename, member.create_system = name, 0
            archive.writestr(member, content)
    with archives.unpacked(tmp_path / "x.zip", tmp_path / "scratch") as folder:
        assert {p.relative_to(folder).as_posix() for p in folder.rglob("*.jpg")} == {
            "cat/1.jpg",
            "dog/sub/2.jpg",
        }


def test_zips_made_on_a_mac_forget_to_say_utf8(tmp_path):
    name = "Ä/ü.jpg".encode()
    pack(tmp_path / "x.zip", {"x" * len(name): b"1"})
    data = (tmp_path / "x.zip").read_bytes().replace(b"x" * len(name), name)
    (tmp_path / "x.zip").write_bytes(data)
    with archives.unpacked(tmp_path / "x.zip", tmp_path / "scratch") as folder:
        assert (folder / "Ä" / "ü.jpg").read_bytes() == b"1"


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
def test_methods_of_compression_that_python_reads(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        archive.writestr("a/1.jpg", b"1" * 1000)
    with archives.unpacked(tmp_path / "x.zip", tmp_path / "scratch") as folder:
        assert (folder / "a" / "1.jpg").read_bytes() == b"1" * 1000


def test_other_methods_are_named_with_the_member(tmp_path):
    archive = pack(tmp_path / "x.zip", {"a/1.jpg": b"1"})
    data = bytearray(archive.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        data[data.index(mark) + offset] = 9
    archive.write_bytes(data)
    with pytest.raises(ValueError, match=r"cannot read this zip, at 'a/1.jpg' .*compression"):
        with archives.unpacked(archive, tmp_path / "scratch"):
            pass
    for offset in (4, 6):
        data[data.index(b"PK\x01\x02") + offset] = 200
    archive.write_bytes(data)
    with pytest.raises(ValueError, match=r"x.zip: Python cannot read this zip"):
        with archives.unpacked(archive, tmp_path / "scratch"):
            pass


@pytest.mark.parametrize("ending", ["tar.bz2", "tbz2", "tar.xz", "txz"])
def test_other_compressed_tars(tmp_path, ending):
    plain = pack(tmp_path / "x.tar", FILES).read_bytes()
    compress = bz2.compress if "b" in ending else lzma.compress
    archive = tmp_path / f"x.{ending}"
    archive.write_bytes(compress(plain))
    with archives.unpacked(archive, tmp_path / "scratch") as folder:
        assert (folder / "top/a b/ü.JPG").read_bytes() == b"one"
    archive.write_bytes(compress(plain)[:-30])
    with pytest.raises(ValueError, match="damaged or not fully downloaded"):
        with archives.unpacked(archive, tmp_path / "scratch"):
            pass


@pytest.mark.parametrize("name", ["x.tar", "x.zip"])
def test_a_member_that_cannot_be_written_costs_only_itself(tmp_path, name, caplog):
    files = {"a/" + "ü" * 200 + ".jpg": b"1", "a/2.jpg": b"2", "a/2.jpg/3.jpg": b"3"}
    with archives.unpacked(pack(tmp_path / name, files), tmp_path / "scratch") as folder:
        assert [path.name for path in (folder / "a").iterdir()] == ["2.jpg"]
    assert "2 members could not be unpacked" in caplog.text and "name too long" in caplog.text


@pytest.mark.parametrize("name", ["x.zip", "x.tgz"])
@pytest.mark.parametrize(
    "data, cause",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><title>Sign in</title>" + b" " * 2000, "an HTML page"),
    ],
)
def test_what_is_no_archive_at_all_is_named(tmp_path, name, data, cause):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=cause):
        with archives.unpacked(tmp_path / name, tmp_path / "scratch"):
            pass


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tgz"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "flipped"])
def test_damaged_archives_say_so(tmp_path, name, damage):
    good = pack(tmp_path / name, {"a": os.urandom(50_000), "b": os.urandom(50_000)})
    data = bytearray(good.read_bytes())
    if damage == "cut":
        data = data[:60_000]
    elif damage == "garbage":
        data = b"<html>404</html>" * 100
    elif name == "x.tar":
        data[512:540] = b"\xff" * 28  # A flipped bit of a file in a plain tar is not noticed.
        data = data[512:]
    else:
        data[30_000] ^= 255
    good.write_bytes(data)
    with pytest.raises(ValueError, match="damaged or not fully downloaded"):
        with archives.unpacked(good, tmp_path / "scratch"):
            pass
    assert not list((tmp_path / "scratch").iterdir())


def test_passwords_are_named(tmp_path):
    archive = pack(tmp_path / "x.zip", {"a": b"secret"})
    data = bytearray(archive.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + offset] |= 1
    archive.write_bytes(data)
    with pytest.raises(ValueError, match="wants a password"):
        with archives.unpacked(archive, tmp_path):
            pass


def test_fingerprints(tmp_path):
    folder = write(tmp_path / "one", {"a/x.jpg": b"1", "b/y.jpg": b"2"})
    first = archives.fingerprint(folder)
    assert archives.fingerprint(folder.rename(tmp_path / "moved")) == first
    folder = tmp_path / "moved"
    write(folder, {".DS_Store": b"?"})
    assert archives.fingerprint(folder) == first
    seen = {first}
    for change in (
        lambda: write(folder, {"a/new.jpg": b"3"}),
        lambda: write(folder, {"a/x.jpg": b"11"}),
        lambda: os.utime(folder / "a/x.jpg", ns=(5, 5)),
        lambda: (folder / "b/y.jpg").rename(folder / "b/z.jpg"),
        lambda: (folder / "b/z.jpg").unlink(),
        lambda: (folder / "b/z.jpg").symlink_to("nowhere"),
    ):
        change()
        seen.add(archives.fingerprint(folder))
    assert len(seen) == 7


def below(root):
    return [path.relative_to(root).as_posix() for path in archives.files_below(root)]


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    root = write(tmp_path / "in", {"a/1.jpg": b"1", "b/c/2.jpg": b"2"})
    write(tmp_path / "other", {"3.jpg": b"3"})
    (root / "b" / "up").symlink_to("..")
    (root / "b" / "self").symlink_to(".")
    (root / "b" / "outside").symlink_to("../..")
    (root / "a" / "root").symlink_to(root)
    (root / "d").symlink_to(tmp_path / "other")
    (root / "a" / "beside").symlink_to(root / "b" / "c")
    assert below(root) == ["a/1.jpg", "b/c/2.jpg", "d/3.jpg"]


def test_folders_that_link_to_each_other_give_every_file_once(tmp_path):
    names = [f"folder {i}" for i in range(7)]
    root = write(tmp_path / "in", {f"{name}/1.jpg": name for name in names})
    for name in names:
        for other in names:
            (root / name / f"to {other}").symlink_to(f"../{other}")
    assert below(root) == [f"{name}/1.jpg" for name in names]


def test_a_file_with_many_names_counts_once(tmp_path):
    root = write(tmp_path / "in", {"b/1.jpg": b"1", "c/2.jpg": b"2"})
    (root / "a.jpg").symlink_to("b/1.jpg")  # the name that is no link counts
    os.link(root / "b/1.jpg", root / "b/other.jpg")
    (root / "nowhere.jpg").symlink_to("gone")
    assert below(root) == ["b/1.jpg", "c/2.jpg", "nowhere.jpg"]
    before = archives.fingerprint(root)
    (root / "a.jpg").unlink()
    assert archives.fingerprint(root) != before


def test_thumbnails_bins_and_previews_are_no_images(tmp_path):
    kept = [
        "photos/1.jpg",
        "thumbs up/2.jpg",
        "recycled/3.jpg",
        "P.photoslibrary/originals/A/4.heic",
        "Old.photolibrary/Masters/5.jpg",
        "@home/6.jpg",
    ]
    litter = [
        *("photos/@eaDir/1.jpg/SYNOPHOTO_THUMB_XL.jpg", "#recycle/1.jpg", "@Recycle/a/1.jpg"),
        *("photos/.@__thumb/default1.jpg", "#snapshot/1.jpg", "$RECYCLE.BIN/S-1-5/$R1.jpg"),
        *("RECYCLER/1.jpg", "System Volume Information/1.jpg", ".Trash-1000/files/1.jpg"),
        *(".Trashes/501/1.jpg", ".thumbnails/normal/1.png", "photos/Thumbs.db", "desktop.ini"),
        *("photos/ehthumbs_vista.db", "lost+found/1.jpg", "C.lrdata/a/1.jpg", "Thumbnails/1.jpg"),
        *("P.photoslibrary/resources/derivatives/4.jpg", "Old.photolibrary/Thumbnails/5.jpg"),
        *("__MACOSX/photos/._1.jpg", "x.cocatalog/Cache/1.jpg"),
    ]  # fmt: skip
    root = write(tmp_path / "in", dict.fromkeys(kept + litter, b""))
    assert below(root) == sorted(kept)
    with archives.unpacked(
        pack(tmp_path / "x.zip", dict.fromkeys(litter, b"1")), tmp_path
    ) as folder:
        assert not [path for path in below(folder) if "library" not in path]


def test_unreadable_folders_are_told_of(tmp_path, monkeypatch):
    root = write(tmp_path / "in", {"a/1.jpg": b"", "b/2.jpg": b""})
    real = os.scandir

    def scandir(path):
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
        archives.files_below(root)
    errors = []
    assert archives.files_below(root, errors.append) == [root / "b/2.jpg"]
    assert errors[0].filename == str(root / "a")


def bomb_of(path, members):
    """An archive with so many bytes of zeros in each of its members."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, length in members.items():
                archive.writestr(name, bytes(length))
    else:
        with tarfile.open(path, "w:gz") as archive:
            for name, length in members.items():
                member = tarfile.TarInfo(name)
                member.size = length
                archive.addfile(member, io.BytesIO(bytes(length)))
    return path


@pytest.mark.parametrize("name", ["x.zip", "x.tgz"])
@pytest.mark.parametrize("members", [{"a": 30_000_000}, {f"{i}/x.jpg": 1 for i in range(400)}])
def test_archive_bombs_are_refused_before_they_fill_the_disk(tmp_path, name, members, monkeypatch):
    monkeypatch.setattr(archives, "MOST_UNPACKED", 1_000_000)
    monkeypatch.setattr(archives, "MOST_TIMES", 10)
    archive = bomb_of(tmp_path / name, members)
    written = []
    real = archives._write
    monkeypatch.setattr(
        archives, "_write", lambda path, *args: written.append(path) or real(path, *args)
    )
    with pytest.raises(InputError, match="refused: its .* unpack to more than .*archive bomb"):
        with archives.unpacked(archive, tmp_path / "scratch"):
            pass
    assert len(written) < 400 and not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("name", ["x.zip", "x.tgz"])
def test_what_does_not_fit_on_the_disk_is_not_unpacked(tmp_path, name, monkeypatch):
    archive = bomb_of(tmp_path / name, {"a/1.jpg": 1000, "a/2.jpg": 3_000_000})
    usage = shutil.disk_usage(tmp_path)._replace(free=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="takes at least 3 MB, but only 2 MB are free"):
        with archives.unpacked(archive, tmp_path / "scratch"):
            pass


def test_names_of_megabytes_are_neither_read_nor_logged(tmp_path, caplog):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(*zip_link("link.jpg", "a" * 50_000_000))
        archive.writestr("1.jpg", b"1")
    tracemalloc.start()
    with archives.unpacked(tmp_path / "x.zip", tmp_path / "scratch") as folder:
        assert below(folder) == ["1.jpg"]
    assert "link.jpg" in caplog.text and len(caplog.text) < 1000
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as archive:
        archive.addfile(link("link.jpg", "a" * 50_000_000))
    del archive
    tracemalloc.reset_peak()
    with pytest.raises(ValueError, match="a header of 50 MB"):
        with archives.unpacked(tmp_path / "x.tgz", tmp_path / "scratch"):
            pass
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_a_list_that_is_something_else_is_named(tmp_path):
    write(tmp_path, {"list.txt": "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"})
    with pytest.raises(ValueError, match="list.txt is a Git LFS pointer"):
        list(archives.read_rows(tmp_path / "list.txt", columns=2))
    (tmp_path / "list.txt").write_bytes("\ufeff1 a.jpg\r\n2 b\x85c.jpg\r\n".encode())
    assert list(archives.read_rows(tmp_path / "list.txt", columns=2)) == [
        ["1", "a.jpg"],
        ["2", "b\x85c.jpg"],
    ]


@pytest.mark.parametrize(
    "read",
    [archives.read_text, image_list.read, cars196._load, roxford5k.read_plain],
    ids=["txt", "csv", "mat", "pkl"],
)
def test_lists_that_never_end_or_are_too_much_are_refused(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(InputError, match=f"{path} is no list of images: not a file"):
            read(path)
    with pytest.raises(InputError, match="is no list of images: larger than"):
        read(tmp_path / "sparse")


@pytest.mark.parametrize("ending", archives.ARCHIVE_ENDINGS)
def test_archives_that_never_end_are_refused(tmp_path, ending):
    os.mkfifo(tmp_path / f"pipe{ending}")
    (tmp_path / f"zero{ending}").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(InputError, match=f"{name}{ending} is no archive: not a file"):
            with archives.unpacked(tmp_path / f"{name}{ending}", tmp_path / "scratch"):
                pass


def test_find_prefers_what_is_nearest(tmp_path):
    write(tmp_path, {"b/images.txt": "", "a/deep/images.txt": "", "c/d/e/f/far.txt": ""})
    assert archives.find([tmp_path], "images.txt") == tmp_path / "b/images.txt"
    assert archives.find([tmp_path / "a"], "images.txt") == tmp_path / "a/deep/images.txt"
    assert archives.find([tmp_path], "far.txt") is None
    assert archives.find([tmp_path / "c", tmp_path / "a"], "deep/images.txt") is not None
    write(tmp_path, {"@eaDir/thumb.txt": ""})
    os.mkfifo(tmp_path / "pipe.zip")
    assert archives.find([tmp_path], "thumb.txt") is archives.find([tmp_path], "pipe.zip") is None


def test_rows_name_the_line_that_is_wrong(tmp_path):
    write(tmp_path, {"list.txt": "header\n1 a b.jpg\n\n2  c name with spaces.jpg \n3 d\n"})
    rows = iter(archives.read_rows(tmp_path / "list.txt", columns=3, skip=1))
    assert next(rows) == ["1", "a", "b.jpg"]
    assert next(rows) == ["2", "c", "name with spaces.jpg"]
    with pytest.raises(ValueError, match="list.txt, line 5"):
        next(rows)
