"""Pictures from strangers: limited before they are read, and before they are decoded."""

import asyncio
from collections import OrderedDict
from threading import Lock

from fastapi import HTTPException, Request

from cgd_jax.data.decode import dimensions
from cgd_jax.search.images import hash_of

__all__ = ["PREFIX", "Uploads", "check_picture", "read_body"]

MAX_BYTES = 20_000_000  # of an upload
MAX_PIXELS = 50_000_000
PATIENCE = 30  # seconds that an upload may take
KEPT_BYTES = 256_000_000  # of all uploads that are remembered
PREFIX = "upload-"  # of their ids; those of an index have no such prefix
# How files of the formats begin that browsers and telephones send. Of those that can be decoded
# beside them, none is worth what its decoder may have of errors.
BEGINNINGS = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"BM",
    b"II*\0",
    b"MM\0*",
)
BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1")


class Uploads:
    """The latest uploads by the hash of their content: as many as fit into some memory."""

    def __init__(self, capacity: int = KEPT_BYTES):
        self.capacity, self.size = capacity, 0
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._lock = Lock()

    def keep(self, data: bytes) -> str:
        """Remembers a picture, forgets those not asked for the longest; returns its id."""
        id = PREFIX + hash_of(data)
        with self._lock:
            if id not in self._kept:
                self.size += len(data)
            self._kept[id] = data
            self._kept.move_to_end(id)
            while self.size > self.capacity and len(self._kept) > 1:
                self.size -= len(self._kept.popitem(last=False)[1])
        return id

    def get(self, id: str) -> bytes | None:
        """Returns a picture, or None if it is not, or no longer, remembered."""
        with self._lock:
            if id in self._kept:
                self._kept.move_to_end(id)
            return self._kept.get(id)


async def read_body(request: Request, limit: int = MAX_BYTES) -> bytes:
    """Reads the body of a request, and no more of it than is allowed.

    Raises:
      HTTPException: 400, it is empty; 408, it takes too long; 413, it is too large.
    """
    too_large = HTTPException(413, f"The file is larger than {limit / 1e6:g} MB.")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limit:
        raise too_large
    pieces, size = [], 0
    try:
        async with asyncio.timeout(PATIENCE):
            async for piece in request.stream():
                size += len(piece)
                if size > limit:
                    raise too_large
                pieces.append(piece)
    except TimeoutError:
        raise HTTPException(408, f"The upload took longer than {PATIENCE} seconds.") from None
    if not size:
        raise HTTPException(400, "There is no picture: send its bytes as the body, or give an id.")
    return b"".join(pieces)


def check_picture(data: bytes) -> None:
    """Looks at the beginning of a file, whatever its name or declared type.

    Raises:
      HTTPException: 413, it has too many pixels; 415, it is no picture of a usual format.
    """
    webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    heif = data[4:8] == b"ftyp" and data[8:12] in BRANDS
    if not (data.startswith(BEGINNINGS) or webp or heif):
        raise HTTPException(
            415, "This is not a picture that can be read: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF."
        )
    try:
        height, width = dimensions(data)
    except ValueError as error:
        raise unreadable(error) from error
    if height * width > MAX_PIXELS:
        raise HTTPException(
            413,
            f"The picture has {width} x {height} pixels, more than {MAX_PIXELS / 1e6:g} million.",
        )


def unreadable(error: ValueError) -> HTTPException:
    """Returns the answer to a picture that cannot be decoded."""
    status = 413 if "decompression bomb" in str(error) else 415
    return HTTPException(status, f"The picture cannot be read: {error}.")
