"""Images from strangers: limited while they arrive, and before they are decoded."""

import asyncio
import contextlib
import re
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from threading import Lock

from fastapi import HTTPException, Request
from starlette.requests import ClientDisconnect

from cgd_jax.search.images import hash_of

__all__ = ["PREFIX", "Uploads", "check_cost", "memory_of", "unreadable"]

MAX_BYTES = 20_000_000  # of an upload
ARRIVING_BYTES = 256_000_000  # of all uploads that are received or searched by at a time
PATIENCE = 30  # seconds that an upload may take
KEPT_BYTES = 256_000_000  # of all uploads that are remembered
PREFIX = "upload-"  # of their ids; those of an index have no such prefix
# A scan of a progressive JPEG costs time for every pixel, and hardly a byte. Cameras and programs
# write about ten; with this many pixels in all of them, decoding takes five seconds.
MAX_SCANS, SCANNED_PIXELS = 100, 4_000_000_000
# Bytes of memory that decoding takes for every pixel, at most. A progressive JPEG has its
# coefficients; of everything else Pillow makes several copies.
JPEG_PIXEL, OTHER_PIXEL = 9, 27
# How files of the formats begin that browsers and telephones send. Of those that can be decoded
# beside them, none is worth what its decoder may have of errors.
JPEG = b"\xff\xd8\xff"
BEGINNINGS = (JPEG, b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*")
BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1")
FORMATS = "This is not an image that can be read: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, HEIC."
# Of a JPEG: all but those without a length, which are stuffed or restart a scan.
MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")
SCAN, END = 0xDA, 0xD9


class Uploads:
    """The latest uploads by the hash of their content: as many as fit into some memory."""

    def __init__(self, capacity: int = KEPT_BYTES):
        self.capacity, self.size = capacity, 0
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._lock = Lock()
        self._arriving: Counter[str] = Counter()  # bytes by the client's address

    def keep(self, data: bytes) -> str:
        """Remembers an image, forgets those not asked for the longest; returns its id.

        HTTPException 415: it does not begin as an image does, whatever its name or type.
        """
        webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
        heif = data[4:8] == b"ftyp" and data[8:12] in BRANDS
        if not (data.startswith(BEGINNINGS) or webp or heif):
            raise HTTPException(415, FORMATS)
        id = PREFIX + hash_of(data)
        with self._lock:
            if id not in self._kept:
                self.size += len(data)
            self._kept[id] = data
            self._kept.move_to_end(id)
            while self.size > self.capacity and len(self._kept) > 1:
                self.size -= len(self._kept.popitem(last=False)[1])
        return id

    def get(self, id: str) -> bytes:
        """Returns an image; HTTPException 404 if it is not, or no longer, remembered."""
        with self._lock:
            if id not in self._kept:
                raise HTTPException(404, "This upload is no longer kept; upload it again.")
            self._kept.move_to_end(id)
            return self._kept[id]

    @contextlib.asynccontextmanager
    async def received(self, request: Request) -> AsyncIterator[bytes]:
        """Reads the body of a request, whose memory counts until the block ends.

        HTTPException: 400, it is empty or breaks off; 408, it takes too long; 413, it is too
        large; 503, too many arrive. No address gets more than half of the memory.
        """
        address, pieces, size = request.client.host if request.client else "", [], 0
        too_large = HTTPException(413, f"The file is larger than {MAX_BYTES / 1e6:g} MB.")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BYTES:
            raise too_large
        try:
            async with asyncio.timeout(PATIENCE):
                async for piece in request.stream():
                    size += len(piece)
                    self._arriving[address] += len(piece)
                    if size > MAX_BYTES:
                        raise too_large
                    held = max(2 * self._arriving[address], self._arriving.total())
                    if held > ARRIVING_BYTES:
                        raise HTTPException(503, "Too many uploads at once; try again.")
                    pieces.append(piece)
            if not size:
                raise HTTPException(400, "There is no image: send its bytes, or give an id.")
            yield b"".join(pieces)
        except TimeoutError:
            raise HTTPException(408, f"The upload took over {PATIENCE} seconds.") from None
        except ClientDisconnect:  # nobody will read the answer
            raise HTTPException(400, "The upload broke off.") from None
        finally:
            self._arriving -= Counter({address: size})


def check_cost(data: bytes, pixels: int, needed: int, memory: int) -> None:
    """HTTPException 413: an image has too many scans, or needs more than all the memory."""
    scans = scans_of(data) if data.startswith(JPEG) else 1
    if scans > min(MAX_SCANS, max(SCANNED_PIXELS // pixels, 1)):
        raise HTTPException(
            413,
            f"The JPEG has {scans} scans, too many for its size. Save it anew, not progressive.",
        )
    if needed > memory:
        raise HTTPException(
            413, f"Decoding the image takes {needed / 1e9:.1f} GB of memory. Send a smaller one."
        )


def memory_of(data: bytes, pixels: int) -> int:
    """Returns how many bytes of memory decoding an image of so many pixels takes at most."""
    return pixels * (JPEG_PIXEL if data.startswith(JPEG) else OTHER_PIXEL)


def scans_of(data: bytes) -> int:
    """Counts the scans of a JPEG, skipping segments as a decoder does."""
    at, scans = 2, 0
    while (found := MARKER.search(data, at)) and found[1][0] != END:
        scans += found[1][0] == SCAN
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2])
    return scans


def unreadable(error: ValueError) -> HTTPException:
    """Returns the answer to an image that cannot be decoded."""
    status = 413 if "decompression bomb" in str(error) else 415
    return HTTPException(status, f"The image cannot be read: {error}.")
