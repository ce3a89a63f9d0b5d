"""Sources of photographs: an archive, or the folder it unpacks to.

A builder sees a folder either way. An archive is unpacked into a scratch folder, which is
removed after the build, also after a failed one.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import logging
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pooch

from cgd_jax.runtime.console import progress

log = logging.getLogger(__name__)

ARCHIVE_ENDINGS = (".tgz", ".tar.gz", ".tar", ".zip")


class Download(NamedTuple):
    """An archive that a public server is known to offer."""

    url: str
    filename: str
    sha256: str | None  # None where the server packs afresh for each request


def is_archive(path: Path) -> bool:
    """Returns whether a name has one of the endings `ARCHIVE_ENDINGS`, in any case."""
    return path.name.lower().endswith(ARCHIVE_ENDINGS)


def fingerprint(path: Path) -> str:
    """Returns 12 hexadecimal digits that change when an archive, file or folder changes.

    They depend on the name, size and time of last change of every file below a folder.
    Contents are not read, so that 100,000 files take about a second. A folder that is moved
    keeps its fingerprint.
    """
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else files_below(path):
        status = file.stat()
        name = file.name if file == path else file.relative_to(path).as_posix()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="replace"))
    return digest.hexdigest()[:12]


def files_below(folder: Path) -> list[Path]:
    """Lists every file below a folder, sorted, without hidden ones and the litter of macOS."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not _litter(name))
        found.extend(Path(parent, name) for name in names if not _litter(name))
    return sorted(found)


def find(folder: Path, name: str, depth: int = 3) -> Path | None:
    """Finds the file or folder `name` (may hold slashes) nearest below `folder`, or None.

    So the folder somebody unpacked, its parent, and an archive that wraps everything in one
    more folder all work. Of several on one level it is the first in alphabetical order.
    """
    level = [folder]
    for _ in range(depth + 1):
        for candidate in level:
            if (candidate / name).exists():
                return candidate / name
        level = sorted(
            Path(entry.path)
            for parent in level
            for entry in os.scandir(parent)
            if entry.is_dir() and not _litter(entry.name)
        )
    return None


@contextlib.contextmanager
def unpacked(source: Path, scratch: Path) -> Iterator[Path]:
    """Yields a folder with the files of an archive; anything else is yielded as it is.

    Args:
      source: archive, folder or file.
      scratch: where to make the temporary folder of an archive.

    Raises:
      ValueError: the archive is damaged, wants a password, or has members that point
        outside of it (absolute paths, `..`) or are links; none of it is used then.
    """
    if source.is_dir() or not is_archive(source):
        yield source
        return
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="incomplete.unpacked_", dir=scratch))
    try:
        extract(source, folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def extract(archive: Path, folder: Path) -> None:
    """Unpacks an archive below `folder`; raises as `unpacked` does."""
    read = _read_zip if archive.name.lower().endswith(".zip") else _read_tar
    size = archive.stat().st_size
    free = shutil.disk_usage(folder).free
    if size > free:  # Photographs hardly compress, so this is nearly what it unpacks to.
        raise OSError(
            f"Unpacking {archive} takes at least {size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB "
            f"are free at {folder}. Free some disk, or let --config.data.dir point elsewhere."
        )
    log.info("Unpacking %s (%.2f GB) into %s", archive, size / 1e9, folder)
    try:
        with progress(size, f"unpacking {archive.name}", unit="B") as bar:
            for name, is_folder, file, read_bytes in read(archive):
                bar.update(read_bytes)
                path = _safe(name, archive)
                if any(_litter(part) for part in path.parts):
                    continue
                target = folder / path
                if is_folder:
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with file, open(target, "wb") as out:
                    shutil.copyfileobj(file, out, 1 << 20)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(
            f"The archive {archive} is damaged or not fully downloaded ({error}). Get it again "
            "and compare its size with the one that the server shows."
        ) from error


def _read_zip(archive: Path):
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            if member.flag_bits & 1:
                raise ValueError(
                    f"The archive {archive} wants a password (for {member.filename!r}). Unpack it "
                    "with the password that its owners gave you and pass the folder instead."
                )
            if stat.S_ISLNK(member.external_attr >> 16):
                raise ValueError(_refusal(archive, member.filename, "is a link"))
            folder = member.is_dir()
            file = None if folder else opened.open(member)
            yield member.filename, folder, file, member.compress_size


def _read_tar(archive: Path):
    with open(archive, "rb") as raw, tarfile.open(fileobj=raw, mode="r:*") as opened:
        before = 0
        for member in opened:
            if not (member.isreg() or member.isdir()):
                raise ValueError(_refusal(archive, member.name, "is a link or a device"))
            position = raw.tell()
            folder = member.isdir()
            file = None if folder else opened.extractfile(member)
            yield member.name, folder, file, position - before
            before = position
        while opened.fileobj.read(1 << 20):  # Up to the checksum, which stands at the very end.
            pass


def _safe(name: str, archive: Path) -> PurePosixPath:
    """Returns the path of a member, if it stays below the folder that is unpacked to."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or path.parts[0:1] and path.parts[0].endswith(":"):
        raise ValueError(_refusal(archive, name, "is an absolute path"))
    if ".." in path.parts:
        raise ValueError(_refusal(archive, name, "points outside of the archive"))
    if "\0" in name:
        raise ValueError(_refusal(archive, name, "is no file name"))
    return path


def _refusal(archive: Path, name: str, why: str) -> str:
    return (
        f"The archive {archive} was refused: its member {name!r} {why}, which no copy of this "
        "data set needs. Get the archive from a source you trust, or unpack it yourself, look at "
        "it, and pass the folder."
    )


def _litter(name: str) -> bool:
    return name.startswith(".") and name not in (".", "..") or name == "__MACOSX"


def download(wanted: Download, folder: Path) -> Path:
    """Fetches an archive into a folder unless it is there already; returns its path.

    It gets its name only when it is whole and, where a checksum is known, right.

    Raises:
      OSError: the server cannot be reached or broke off.
      ValueError: the checksum differs.
    """
    pooch.get_logger().setLevel(logging.WARNING)  # else it says what the progress bar says
    try:
        with progress(1, f"downloading {wanted.filename}", unit="B") as bar:
            # pooch sets the total, and at the end counts anew from 0: tqdm's way to do so
            # would forget when it started.
            bar.reset = lambda: setattr(bar, "n", 0)
            path = pooch.retrieve(
                wanted.url,
                wanted.sha256,
                wanted.filename,
                folder,
                downloader=pooch.HTTPDownloader(bar, chunk_size=1 << 20, timeout=60),
            )
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError  # of a wrong checksum
        raise kind(
            f"Downloading {wanted.url} failed ({error}). Try again later, or get the archive "
            "elsewhere and pass its path as --config.data.source."
        ) from error
    return Path(path)


def read_rows(path: Path, columns: int, skip: int = 0) -> Iterator[list[str]]:
    """Reads the rows of a list of whitespace-separated columns; the last may hold spaces.

    Raises:
      ValueError: a row has fewer columns, with its line number.
    """
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    for number, line in enumerate(lines[skip:], start=skip + 1):
        if not line.strip():
            continue
        row = line.strip().split(maxsplit=columns - 1)
        if len(row) < columns:
            raise ValueError(
                f"{path}, line {number}: expected {columns} columns, found {line!r}. The list is "
                "damaged or of another data set; get it again."
            )
        yield row
