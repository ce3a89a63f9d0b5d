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

PATIENCE = 30  # seconds that an upload may take
KEPT_BYTES = 256_000_000  # of all uploads that are remembered
ARRIVING_BYTES = KEPT_BYTES // 2  # of those that are received, or searched by for the first time
MAX_BYTES = ARRIVING_BYTES // 2  # of an upload: telephones write 200 megapixels in 50 MB
PREFIX = "upload-"  # of their ids; those of an index have no such prefix
# How files of the formats begin that browsers and telephones send. Of those that can be decoded
# beside them, none is worth what its decoder may have of errors.
BEGINNINGS = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM|II\*\0|MM\0\*|RIFF....WEBP|"
    rb"....ftyp(avi[fs]|hei[cx]|hevc|m[is]f1)",
    re.DOTALL,
)
FORMATS = "This is not an image that can be read: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, HEIC."


class Uploads:
    """The latest uploads by the hash of their content: as many as fit into some memory."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._lock, self._bytes = Lock(), 0
        self._arriving: Counter[str] = Counter()  # bytes by the client's address

    def keep(self, data: bytes) -> str:
        """Remembers an image, forgets those not asked for the longest; returns its id.

        HTTPException 415: it does not begin as an image does, whatever its name or type.
        """
        if not BEGINNINGS.match(data):
            raise HTTPException(415, FORMATS)
        id = PREFIX + hash_of(data)
        with self._lock:
            if id not in self._kept:
                self._kept[id] = data
                self._bytes += len(data)
            self._kept.move_to_end(id)
            while self._bytes > KEPT_BYTES:
                self._bytes -= len(self._kept.popitem(last=False)[1])
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

        HTTPException: 400, it is empty; 408, it takes too long; 413, it is too large; 503, too
        many arrive. No address gets more than half of the memory.
        """
        address, data = request.client.host if request.client else "", bytearray()
        try:
            await self._fill(data, request, address)
            yield bytes(data)
        finally:
            self._arriving -= Counter({address: len(data)})

    async def _fill(self, data: bytearray, request: Request, address: str) -> None:
        too_large = HTTPException(413, f"The file is larger than {MAX_BYTES / 1e6:g} MB.")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BYTES:
            raise too_large
        try:
            async with asyncio.timeout(PATIENCE):
                async for piece in request.stream():
                    data += piece
                    self._arriving[address] += len(piece)
                    if len(data) > MAX_BYTES:
                        raise too_large
                    held = max(2 * self._arriving[address], self._arriving.total())
                    if held > ARRIVING_BYTES:
                        raise HTTPException(503, "Too many uploads at once; try again.")
        except (TimeoutError, ClientDisconnect):
            raise HTTPException(408, f"The upload took over {PATIENCE} seconds.") from None
        if not data:
            raise HTTPException(400, "There is no image: send its bytes, or give an id.")
