"""Sources of images: an archive, or the folder it unpacks to.

A builder sees a folder either way. An archive is unpacked into a scratch folder, which is
removed after the build, also after a failed one.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import itertools
import logging
import lzma
import os
import posixpath
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from cgd_jax.data.dataset import listed
from cgd_jax.runtime.console import progress, quantity
from cgd_jax.runtime.errors import InputError
from cgd_jax.runtime.files import describe_impostor, read_regular

log = logging.getLogger(__name__)

ARCHIVE_ENDINGS = (".zip", ".tar", ".tgz", ".tar.gz", ".tbz2", ".tar.bz2", ".txz", ".tar.xz")

# Names of folders and files that hold copies or nothing.
LITTER = re.compile(
    r"\.(?!\.?$).*"  # hidden
    r"|@(eaDir|tmp|Recycle|Recently-Snapshot|__thumb)|#(recycle|snapshot)"  # of Synology and QNAP
    r"|\$RECYCLE\.BIN|(?-i:RECYCLE[RD])|System Volume Information|desktop\.ini|(eh)?thumbs.*\.db"
    r"|__MACOSX|Network Trash Folder|Temporary Items|lost\+found"
    r"|thumbnails|.+\.(lrdata|cocatalog|cosessiondb)",  # of photo programs
    re.IGNORECASE | re.DOTALL,
)
# Libraries of macOS, and the only folders in them that hold what was imported.
LIBRARIES = (".photoslibrary", ".photolibrary", ".migratedphotolibrary", ".aplibrary")
ORIGINALS = ("originals", "masters")

# An archive of text unpacks to some tens of its size. A file takes a block on disk.
MOST_TIMES, MOST_UNPACKED, BLOCK = 100, 1 << 30, 4096
LONGEST_NAME = 4096  # of a path on most systems
HEADERS = b"LKxgX"  # types of such members in a tar

# What the libraries raise for damaged archives.
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError)

# Errors of the disk rather than of a name.
NO_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)

csv.field_size_limit(1 << 24)  # some tables list images in a cell


def is_archive(path: Path) -> bool:
    """Returns whether a name has one of the endings `ARCHIVE_ENDINGS`, in any case."""
    return path.name.lower().endswith(ARCHIVE_ENDINGS)


def fingerprint(path: Path) -> str:
    """Returns 12 hexadecimal digits that change when an archive, file or folder changes.

    Of every file the name, size and time count, relative to the folder, which may be moved.
    """
    digest = hashlib.sha256()
    for file, _ in sorted(_walk(path)):
        try:
            status = file.stat()
        except OSError:  # a link to nowhere, for example
            status = file.lstat()
        name = file.name if file == path else file.relative_to(path).as_posix()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="replace"))
    return digest.hexdigest()[:12]


def files_below(path: Path, onerror: Callable[[OSError], object] | None = None) -> list[Path]:
    """Lists every file below a folder, sorted, links to folders included, litter left out.

    A file counts once, if possible under a name that is no link. `onerror` gets what is unreadable
    and is raised without it.
    """
    return sorted(file for file, is_new in _walk(path, onerror) if is_new)


def _walk(
    root: Path, onerror: Callable[[OSError], object] | None = None
) -> Iterator[tuple[Path, bool]]:
    """Yields every file, link to a file, and link to what was seen; and whether it is new."""
    # A link to a folder around the root would list what is beside it.
    seen = {_identity(outer.stat()) for outer in root.resolve().parents}
    waiting = deque([root])
    while waiting:
        path = waiting.popleft()
        try:
            status = path.stat()
        except OSError:  # a link to nowhere
            yield path, True
            continue
        is_new = _identity(status) not in seen
        seen.add(_identity(status))
        if not (is_new and stat.S_ISDIR(status.st_mode)):
            yield path, is_new
            continue
        library = path.suffix.lower() in LIBRARIES
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            if onerror is None:
                raise
            onerror(error)
            continue
        for entry in entries:
            if is_litter(entry.name) or library and entry.name.lower() not in ORIGINALS:
                continue
            if entry.is_symlink():  # Links come last.
                waiting.append(Path(entry.path))
            else:
                waiting.appendleft(Path(entry.path))


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def find(folders: Iterable[Path], name: str) -> Path | None:
    """Finds the file or folder `name` (may hold slashes) nearest below some folders, or None."""
    for level in range(4):
        for folder in folders:
            for path in sorted(folder.glob("*/" * level + name)):
                inside = not any(map(is_litter, path.relative_to(folder).parts))
                if inside and (path.is_file() or path.is_dir()):  # no pipe
                    return path
    return None


@contextlib.contextmanager
def unpacked(source: Path, scratch: Path) -> Iterator[Path]:
    """Yields a folder with the files of an archive; anything else is yielded as it is.

    Links become second names of files of the archive; other links, devices and names that cannot be
    written are left out with a warning. Raises InputError for an archive that is damaged, wants a
    password, holds far more than its size or than the disk, or points outside of itself.
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
    if not archive.is_file():  # but a pipe or a device, which never ends
        raise InputError(f"{archive} is no archive: not a file.")
    size, free = archive.stat().st_size, shutil.disk_usage(folder).free
    log.info("Unpacking %s (%s) into %s", archive, quantity(size, "B"), folder)
    members = _zip_members if archive.name.lower().endswith(".zip") else _tar_members
    links, failed, name, total = {}, [], "", 0
    try:
        with progress(size, f"unpacking {archive.name}", unit="B") as bar:
            for name, length, link, contents in members(archive):
                bar.update(length)
                path = _safe_path(name, archive)
                total += max(length, BLOCK)
                if total > MOST_UNPACKED + MOST_TIMES * size:
                    raise InputError(
                        f"The archive {archive} was refused: its {quantity(size, 'B')} unpack to "
                        f"more than {quantity(total - length, 'B')}, as no images do (an "
                        "archive bomb?). Unpack it yourself, look at it, and pass the folder."
                    )
                needed = max(total, size)  # Images hardly compress.
                if needed > 0.98 * free:
                    raise InputError(
                        f"Unpacking {archive} takes at least {quantity(needed, 'B')}, but only "
                        f"{quantity(free, 'B')} are free at {folder}. Free some disk, or let "
                        "--config.data.dir point elsewhere."
                    )
                if any(is_litter(part) for part in path.parts):
                    continue
                if link is not None:
                    links[folder / path] = link
                elif error := _write(folder / path, contents):
                    failed.append(f"{name!r} ({error})")
    except NotImplementedError as error:
        raise InputError(
            f"{archive}: Python cannot read this zip{name and f', at {name!r}'} ({error}). Unpack "
            "it with another program and pass the folder, or pack it anew with Deflate."
        ) from error
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # else it is of bz2
            raise
        with open(archive, "rb") as file:
            found = describe_impostor(file.read(512))
        raise InputError(
            f"The archive {archive} is damaged or not fully downloaded "
            f"({f'it is {found}' if found else error}). Get it again and compare its size with the "
            "one that the server shows."
        ) from error
    for target, link in links.items():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / _safe_path(link, archive), target)
        except (OSError, ValueError):  # to a folder, to nowhere, out of the archive
            failed.append(f"{target.relative_to(folder).as_posix()!r} (a link to {link[:200]!r})")
    if failed:
        message = "%s: %d members could not be unpacked and are left out: %s"
        log.warning(message, archive, len(failed), listed(failed, 20))


def _write(path: Path, contents: Callable[[], IO[bytes]] | None) -> str | None:
    """Writes a member, a folder if it has no contents; returns why it cannot have its name."""
    try:
        if contents is None:
            path.mkdir(parents=True, exist_ok=True)
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        out = open(path, "wb")
    except OSError as error:
        if error.errno in NO_DISK:
            raise
        return error.strerror
    with out, contents() as file:
        shutil.copyfileobj(file, out, 1 << 20)
    return None


# Name, bytes it unpacks to, the member it is a link to, contents (None: a folder).
Member = tuple[str, int, str | None, Callable[[], Any] | None]


def _zip_members(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            if member.flag_bits & 1:
                raise InputError(
                    f"The archive {archive} wants a password (for {member.filename!r}). Unpack it "
                    "with the password that its owners gave you and pass the folder instead."
                )
            name, link = _zip_name(member), None
            if stat.S_ISLNK(member.external_attr >> 16):
                with opened.open(member) as file:
                    original = file.read(LONGEST_NAME).decode("utf-8", "surrogateescape")
                link = posixpath.join(posixpath.dirname(name), original)
            contents = None if name.endswith("/") else partial(opened.open, member)
            yield name, member.file_size, link, contents


def _zip_name(member: zipfile.ZipInfo) -> str:
    """Returns the name of a member with slashes and, where it is certain, as Unicode."""
    name = member.filename
    if not member.flag_bits & 0x800:  # not marked as UTF-8, which macOS forgets
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")  # of some programs for Windows


class _TarInfo(tarfile.TarInfo):
    """A member whose header, which is read into memory, is no longer than names are."""

    def _proc_member(self, opened):
        if self.type in HEADERS and self.size > 16 * LONGEST_NAME:
            raise tarfile.ReadError(f"a header of {quantity(self.size, 'B')}")
        return super()._proc_member(opened)


def _tar_members(archive: Path) -> Iterator[Member]:
    with tarfile.open(archive, tarinfo=_TarInfo) as opened:
        for member in opened:
            link = None
            if member.issym():
                link = posixpath.join(posixpath.dirname(member.name), member.linkname)
            elif member.islnk():
                link = member.linkname
            elif not (member.isreg() or member.isdir()):
                log.warning("%s: %r is a device, and is left out.", archive, member.name)
                continue
            contents = None if member.isdir() else partial(opened.extractfile, member)
            yield member.name, member.size, link, contents
        while opened.fileobj.read(1 << 20):  # up to the checksum, which stands at the very end
            pass


def _safe_path(name: str, archive: Path) -> PurePosixPath:
    """Returns the path of a member, if it stays below the folder that is unpacked to."""
    name = name.replace("\\", "/")
    path = PurePosixPath(posixpath.normpath(name))
    outside = name.startswith("/") or name.partition("/")[0].endswith(":") or ".." in path.parts
    if not outside and "\0" not in name:
        return path
    raise InputError(
        f"The archive {archive} was refused: its member {name!r} is no path inside of it, which no "
        "copy of this data set needs. Get the archive from a source you trust, or unpack it "
        "yourself, look at it, and pass the folder."
    )


def is_litter(name: str) -> bool:
    """Returns whether a name is hidden, or of a bin, of thumbnails or what else holds no images."""
    return LITTER.fullmatch(name) is not None


def read_list(path: Path) -> bytes:
    """Reads a file that says which image is what; InputError if it cannot be one."""
    try:
        data = read_regular(path)
    except ValueError as error:
        raise InputError(f"{path} is no list of images: {error}.") from error
    if impostor := describe_impostor(data):
        raise InputError(f"{path} is {impostor}, not a list of images.")
    return data


def read_text(path: Path) -> str:
    """Reads a list of a data set; bytes that are not UTF-8 become surrogates."""
    return read_list(path).decode("utf-8-sig", "surrogateescape")


def read_rows(path: Path, columns: int, skip: int = 0) -> Iterator[list[str]]:
    """Reads a list of whitespace-separated columns; the last may hold spaces."""
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines[skip:], start=skip + 1):
        if not line.strip():
            continue
        row = line.strip().split(maxsplit=columns - 1)
        if len(row) < columns:
            raise InputError(
                f"{path}, line {number}: expected {columns} columns, found {line!r}. The list is "
                "damaged or of another data set; get it again."
            )
        yield row


def read_csv(
    path: Path, columns: Sequence[str], text: str | None = None
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields the rows of a table: where each stands, for messages, and its cells by column.

    Cells are separated by commas, semicolons, tabs or |. The first line names the columns, some of
    which are needed; their names become lower case. `text` is what the file holds, if it is known.
    """
    text = read_text(path) if text is None else text
    text = re.sub(r"\Asep=[^\r\n]*", "", text, flags=re.IGNORECASE)  # for Excel
    try:
        for delimiter in ",;\t|":
            lines = io.StringIO(text, newline="")
            table = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
            rows = ([cell.strip() for cell in cells] for cells in table)
            title = next(filter(any, rows), [])
            names = [name.lower() for name in title]
            if set(columns) <= set(names):
                break
        else:
            raise InputError(
                f"{path}: the first line must name the columns {', '.join(columns)}; found "
                f"{''.join(title) or 'an empty file'}."
            )
        for cells in rows:
            where = f"{path}, line {table.line_num}"
            if any(cells[len(names) :]):
                raise InputError(
                    f"{where}: there are {len(cells)} cells, but {len(names)} columns. Put a name "
                    f'that holds {delimiter!r} in quotation marks: "a{delimiter}b.jpg".'
                )
            if any(cells) and cells != title:
                yield where, dict(itertools.zip_longest(names, cells[: len(names)], fillvalue=""))
    except csv.Error as error:
        raise InputError(f"{path}, line {table.line_num}: {error}.") from error
