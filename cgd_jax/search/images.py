"""Images on their way into an index: listed, read, made small."""

import contextlib
import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from cgd_jax.data import archives, image_list
from cgd_jax.data.decode import ENDINGS, FORMATS, PNG, looks_like_image, read_file, resize
from cgd_jax.data.images import Box, at_least, clip, extent, load, naming
from cgd_jax.data.shapes import Size, as_shape, nearest
from cgd_jax.runtime import buckets
from cgd_jax.runtime.errors import InputError
from cgd_jax.runtime.files import SOFTWARE
from cgd_jax.search.stores import Record, composed, is_local

THUMBNAIL = 192  # pixels, the longer side
QUALITY = 80  # of their JPEG, and of what a page shows
# What folders of splits are called, above those of classes.
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "query", "gallery"}
EXIF, DATE_TAKEN = 0x8769, 0x9003  # tags
LATEST = 2**63 - 1  # ns that databases hold, of 2262; files may claim any date

# What is read may be a temporary file, or the address of an object in a bucket.
Listed = tuple[Record, Path | str]
LeftOut = tuple[str, str]  # path, reason


def id_of(path: str) -> str:
    """Returns the id of the image with this path: 20 hexadecimal digits."""
    return hashlib.sha256(path.encode()).hexdigest()[:20]


def hash_of(data: bytes) -> str:
    """Returns the hash of a file: 32 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()[:32]


def reason_of(error: Exception) -> str:
    """Returns why a file cannot be read, in a few words."""
    return getattr(error, "strerror", None) or str(error)


def read(image: Any, size: Size, crop: Box | None = None) -> tuple[np.ndarray, dict[str, Any]]:
    """Reads an image that `data.images.load` takes, or a part of it; decodes it once.

    Returns pixels of the size, as `data.images.cut` makes them, and the fields of `Record` that
    follow from the content. Raises as `data.images.read_image`; ValueError also for an empty crop.
    """
    with naming(image):
        content = load(image)
        shape = as_shape(size if isinstance(size, int) else nearest(size, *extent(content, crop)))
        found = at_least(content, shape, crop)
        x0, y0, x1, y1 = clip(crop, found.height, found.width)
    date = taken(content) if isinstance(content, bytes) else 0
    if isinstance(content, np.ndarray):
        content = f"{content.shape}".encode() + content.tobytes()
    pixels, width, height = resize(found.pixels, shape), x1 - x0, y1 - y0
    thumbnail, digest = as_jpeg(found.pixels, width, height), hash_of(content)
    fields = {"hash": digest, "width": width, "height": height, "thumbnail": thumbnail}
    return pixels, {**fields, "taken": date}


def taken(data: bytes) -> int:
    """Returns when EXIF says that a photograph was taken, in ns since 1970; 0 if it does not."""
    with contextlib.suppress(Exception):  # broken EXIF raises nearly anything
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            text = Image.Image.getexif(image).get_ifd(EXIF)[DATE_TAKEN]
        moment = datetime.strptime(text, "%Y:%m:%d %H:%M:%S").timestamp()
        return max(0, min(int(moment) * 10**9, LATEST))
    return 0


def as_jpeg(pixels: np.ndarray, width: int, height: int, side: int = THUMBNAIL) -> bytes:
    """Makes a JPEG of at most `side` of an image, whose pixels may have any other shape."""
    scale = min(1.0, side / max(width, height))
    small = resize(pixels, (max(round(height * scale), 1), max(round(width * scale), 1)))
    return simplejpeg.encode_jpeg(np.ascontiguousarray(small), quality=QUALITY)


def file_of(record: Record) -> bytes | None:
    """Returns the file of an indexed image, if it is still what was indexed; else None."""
    path = Path(record.path)
    with contextlib.suppress(OSError, ValueError):
        if record.path and path.is_file() and path.stat().st_size == record.size:
            data = path.read_bytes()
            if hash_of(data) == record.hash:
                return data
    return None


def content_of(file: Path | str) -> bytes:
    """Reads a file, or an object in a bucket; raises OSError, ValueError where it is no image."""
    data = buckets.read(str(file)) if buckets.is_bucket(file) else read_file(file)
    if data.startswith(PNG) and b"tEXtSoftware\0" + SOFTWARE.encode() in data[:1000]:
        raise ValueError("a picture that this program drew")
    return data


def record_of(
    file: Path, path: str, label: str | None, source: str = "", modified: int | None = None
) -> Record:
    """Returns what is known of an image called `path` before its file is read; raises OSError.

    `modified` is in ns, in place of when the file was changed last.
    """
    status = file.stat()
    modified = status.st_mtime_ns if modified is None else modified
    modified = max(-LATEST, min(modified, LATEST))
    label = composed(label)
    return Record(id_of(path), path, label, status.st_size, source=source, modified=modified)


def is_list(source: str) -> bool:
    """Returns whether a source is a CSV, by its name."""
    return source.lower().endswith(".csv")


def is_folder(source: str) -> bool:
    """Returns whether a source is a folder, by its name: it may be away."""
    return not is_list(source) and not archives.is_archive(Path(source))


def files_of(folder: Path) -> tuple[list[Path], list[LeftOut]]:
    """Lists the files of a folder, and what of it cannot be read."""
    errors: list[OSError] = []
    found = archives.files_below(folder, errors.append)
    return found, [(str(error.filename), reason_of(error)) for error in errors]


def label_of(path: Path) -> str | None:
    """Returns the name of the first folder; of the second, where the first is that of a split."""
    folders = path.parts[:-1]
    if len(folders) > 1 and folders[0].lower() in SPLITS:
        folders = folders[1:]
    return folders[0] if folders else None


class Listing(NamedTuple):
    """What sources hold."""

    images: dict[str, Listed]
    sources: set[str]
    left_out: list[LeftOut]

    def add(
        self, file: Path, path: str, label: str | None, source: str, modified: int | None = None
    ) -> None:
        """Adds a file, or why it is no image; see `record_of`."""
        try:
            f"{path}{label}".encode()
            if looks_like_image(file):
                self.images[id_of(path)] = record_of(file, path, label, source, modified), file
                return
            reason = "no image by its name" if file.exists() else "there is no such file"
        except UnicodeEncodeError:
            path = path.encode(errors="backslashreplace").decode()
            reason = "its name is not valid UTF-8; rename it"
        except FileNotFoundError as error:
            reason = reason_of(error)
        except OSError:  # it is there; who reads it will learn what is the matter
            record = Record(id_of(path), path, composed(label), source=source)
            self.images[record.id] = record, file
            return
        self.left_out.append((path, reason))


@contextlib.contextmanager
def listed(sources: Iterable[str | Path], address: str) -> Iterator[Listing]:
    """Lists the images of sources, which can be read while the block runs.

    These are folders, also in buckets, archives, whose members were changed when they were and
    have paths that begin with theirs, and CSVs with the columns path and label. Archives are
    unpacked beside the index at `address`; files of indexes are none. Raises InputError: there is
    no such source, or it holds no image; ValueError: an archive or a CSV is damaged.
    """
    scratch = Path(address).parent if is_local(address) else Path.cwd()
    found = Listing({}, set(), [])
    with contextlib.ExitStack() as stack:
        # Lists come last: what they say of an image counts.
        for given in sorted(map(str, sources), key=is_list):
            before, source = len(found.left_out), given.rstrip("/")
            if not buckets.is_bucket(given):
                source = os.path.abspath(Path(given).expanduser())
            file = Path(source)
            if buckets.is_bucket(given):
                _list_bucket(source, found)
            elif not file.exists():
                raise InputError(
                    f"--images={source}: there is no such folder, archive or CSV. The images that "
                    f"an index has of it stay there."
                )
            elif is_list(source) and file.is_file():
                for row in image_list.read(file):
                    found.add(row.path, str(row.path), row.label, source)
            elif file.is_dir() or archives.is_archive(file):
                folder = stack.enter_context(archives.unpacked(file, scratch))
                _list_folder(folder, file, os.path.abspath(address), found)
            else:
                raise InputError(
                    f"--images={source} is neither a folder, nor a CSV, nor an archive "
                    f"({', '.join(archives.ARCHIVE_ENDINGS)})."
                )
            if not any(record.source == source for record, _ in found.images.values()):
                raise InputError(
                    f"--images={given} holds no image, but {len(found.left_out) - before:,} other "
                    f"files. Nothing was changed; to empty an index, delete it."
                )
            found.sources.add(source)
        yield found


def _list_folder(folder: Path, source: Path, index: str, found: Listing) -> None:
    """Adds the files of a folder, which is a source or where it is unpacked."""
    modified = None if source.is_dir() else source.stat().st_mtime_ns
    inside, unreadable = files_of(folder)
    found.left_out.extend(unreadable)
    for file in inside:
        below = file.relative_to(folder)
        path = source / below
        if not (path.is_relative_to(index) or any(part.endswith(".lance") for part in below.parts)):
            found.add(file, str(path), label_of(below), str(source), modified)


def _list_bucket(source: str, found: Listing) -> None:
    """Adds the objects of a folder in a bucket, by their names; see `buckets.objects`."""
    for name, size, modified in buckets.objects(source):
        path, below = f"{source}/{name}", Path(name)
        if any(archives.is_litter(part) or part.endswith(".lance") for part in below.parts):
            continue
        if below.suffix.lower() in ENDINGS:
            label = composed(label_of(below))
            record = Record(id_of(path), path, label, size, source=source, modified=modified)
            found.images[record.id] = record, path
        else:
            found.left_out.append((path, "no image by its name"))
