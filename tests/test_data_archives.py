"""Archives: every form unpacks alike, dangerous and damaged ones are refused whole."""

import hashlib
import io
import os
import stat
import tarfile
import zipfile

import pytest

from cgd_jax.data import archives
from tests.dataset_samples import pack, serving, write

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


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_tars_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        member = tarfile.TarInfo("innocent")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(ValueError, match="'innocent' is a link or a device"):
        with archives.unpacked(tmp_path / "x.tar", tmp_path / "scratch"):
            pass


def test_links_in_zips_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        member = zipfile.ZipInfo("innocent")
        member.create_system, member.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, "/etc/passwd")
    with pytest.raises(ValueError, match="'innocent' is a link"):
        with archives.unpacked(tmp_path / "x.zip", tmp_path / "scratch"):
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
    ):
        change()
        seen.add(archives.fingerprint(folder))
    assert len(seen) == 6


def test_find_prefers_what_is_nearest(tmp_path):
    write(tmp_path, {"b/images.txt": "", "a/deep/images.txt": "", "c/d/e/f/far.txt": ""})
    assert archives.find(tmp_path, "images.txt") == tmp_path / "b/images.txt"
    assert archives.find(tmp_path / "a", "images.txt") == tmp_path / "a/deep/images.txt"
    assert archives.find(tmp_path, "far.txt") is None


def test_rows_name_the_line_that_is_wrong(tmp_path):
    write(tmp_path, {"list.txt": "header\n1 a b.jpg\n\n2  c name with spaces.jpg \n3 d\n"})
    rows = iter(archives.read_rows(tmp_path / "list.txt", columns=3, skip=1))
    assert next(rows) == ["1", "a", "b.jpg"]
    assert next(rows) == ["2", "c", "name with spaces.jpg"]
    with pytest.raises(ValueError, match="list.txt, line 5"):
        next(rows)


def test_download(tmp_path):
    content = os.urandom(3_000_000)
    root = write(tmp_path / "served", {"x.tgz": content})
    with serving(root) as address:
        checksum = hashlib.sha256(content).hexdigest()
        wanted = archives.Download(f"{address}/x.tgz", "x.tgz", checksum)
        target = archives.download(wanted, tmp_path / "downloads")
    assert target == tmp_path / "downloads" / "x.tgz" and target.read_bytes() == content
    # The second time no server is asked.
    assert archives.download(wanted, tmp_path / "downloads") == target


@pytest.mark.parametrize(
    "path, checksum, error, message",
    [
        ("x.tgz", "0" * 64, ValueError, "hash of downloaded file.*--config.data.source"),
        ("missing", None, OSError, "404"),
        ("cut", None, OSError, "--config.data.source"),
    ],
)
def test_failed_downloads_leave_nothing(tmp_path, path, checksum, error, message):
    with serving(write(tmp_path / "served", {"x.tgz": b"content"})) as address:
        wanted = archives.Download(f"{address}/{path}", "x.tgz", checksum)
        with pytest.raises(error, match=message):
            archives.download(wanted, tmp_path / "downloads")
    assert not list((tmp_path / "downloads").iterdir())


def test_tar_reading_counts_all_bytes(tmp_path, monkeypatch):
    # The progress bar of a compressed tar is fed with compressed bytes: they must add up.
    archive = pack(tmp_path / "x.tgz", {f"{i}": os.urandom(30_000) for i in range(20)})
    total = sum(count for *_, count in archives._read_tar(archive))
    assert 0.5 * archive.stat().st_size < total <= archive.stat().st_size
    assert isinstance(next(archives._read_zip(pack(tmp_path / "x.zip", {"a": b"1"})))[2], io.IOBase)
