"""What requests share: the index, the latest uploads, and those who decode and embed."""

import asyncio
import contextlib
import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from fastapi import Depends, HTTPException, Request
from pydantic import BaseModel, Field

from cgd_jax.data.decode import MAX_PIXELS, dimensions
from cgd_jax.data.images import Box, cut
from cgd_jax.data.shapes import Size
from cgd_jax.search import Hit, Index, collection
from cgd_jax.search.images import as_jpeg, hash_of
from cgd_jax.search.stores import Record
from cgd_jax.serve import uploads
from cgd_jax.serve.device import Decoder, Device, Threads
from cgd_jax.serve.heat import Heat
from cgd_jax.serve.updating import Updater

__all__ = ["Served", "Service", "Shown"]

CAPACITY = 32  # searches at once; more are refused
VECTORS = 1000  # of uploads that are remembered
NO_IMAGE = "The index has no such image."
LISTINGS = 4  # of filters and orders, that are remembered
OLDEST = 60  # seconds that a count is believed where the database has no versions


class Shown(BaseModel):
    """An image of the index."""

    id: str
    name: str = Field(description="of its file")
    folder: str = Field(description="below the one that holds all images")
    label: str | None
    path: str | None = Field(description="only if the server was told to show paths")


class Service:
    """All that is made once for an index that is served; the routes are its interface."""

    def __init__(self, index: Index, show_paths: bool):
        self.index, self.show_paths = index, show_paths
        self.uploads = uploads.Uploads()
        self.device = Device(index.embed_pixels, batch_size=16)
        self.decoder = Decoder(MAX_PIXELS)
        # Not the device's thread: the first explanation compiles for long.
        self.heat, self.explainer = Heat(index), Threads(1, "explainer")
        self.comparer, self.updater = Threads(1, "comparer"), Updater(index)
        self._gate = asyncio.Semaphore(CAPACITY)
        self._vectors: dict[tuple[str, str | None], np.ndarray] = {}  # of uploads, for their pages
        self._labels = functools.lru_cache(1)(lambda version: index.labels())
        self._listing = functools.lru_cache(LISTINGS)(
            lambda version, *of: collection.listing(index, *of)
        )
        self._root = functools.lru_cache(1)(
            lambda version: collection.root_of(self._listing(version, None, "newest"))
        )

    def gate(self) -> asyncio.Semaphore:
        """Returns what lets in as many as can be served in good time; HTTPException 503."""
        if self._gate.locked():
            raise HTTPException(503, "Too many searches at once; try again.", {"Retry-After": "1"})
        return self._gate

    def labels(self) -> dict[str, int]:
        """Counts the images of every label."""
        return self._labels(self._version())

    def listing(self, where: str | None, order: str) -> pa.Table:
        """Lists images as `collection.listing` does."""
        return self._listing(self._version(), where, order)

    def _version(self) -> float:
        version = self.index.store.version()
        return time.monotonic() // OLDEST if version is None else version

    def root(self) -> str:
        """Returns the path of the folder that holds all images, with a separator behind it."""
        return self._root(self._version())

    def shown(self, images: Sequence[Hit | Record], root: str) -> list[dict[str, Any]]:
        """Returns the fields of `Shown` of images."""
        found = []
        for image in images:
            folder, name = collection.split(image.path, root)
            path = image.path if self.show_paths else None
            found.append(
                {"id": image.id, "name": name, "folder": folder, "label": image.label, "path": path}
            )
        return found

    async def vector(self, id: str, crop: str | None) -> np.ndarray:
        """Returns the vector [D] of an image, or of a part of it."""
        upload = id.startswith(uploads.PREFIX)
        if crop is None and not upload:
            with contextlib.suppress(KeyError):
                return await asyncio.to_thread(self.index.vector, id)
            raise HTTPException(404, NO_IMAGE)
        if (id, crop) in self._vectors:
            return self._vectors[id, crop]
        vector = await self.device.embed(await self.decoder.run(self.pixels, id, crop))
        if upload:  # its content does not change
            self._vectors[id, crop] = vector
            while len(self._vectors) > VECTORS:
                del self._vectors[next(iter(self._vectors))]
        return vector

    def record(self, id: str) -> Record:
        """Returns what is known of an indexed image; HTTPException 404 if there is none."""
        record = self.index.get(id)
        if record is None:
            raise HTTPException(404, NO_IMAGE)
        return record

    def pixels(self, id: str, crop: str | None = None) -> np.ndarray:
        """Decodes an image, or a part of it, to what is embedded; in a thread of the decoder."""
        return self._decoded(id, crop, self.index.network.size)[0]

    def drawn(self, id: str, side: int) -> bytes:
        """Returns an image as a JPEG whose longer side has at most `side` pixels; likewise."""
        pixels, height, width = self._decoded(id, None, side)
        return as_jpeg(pixels, width, height, side)

    def _decoded(self, id: str, crop: str | None, size: Size) -> tuple[np.ndarray, int, int]:
        """Decodes an image once: pixels of a size, and the height and width of the whole."""
        if id.startswith(uploads.PREFIX):
            data = self.uploads.get(id)
        else:
            record = self.record(id)
            data = file_of(record) or record.thumbnail
        try:
            height, width = dimensions(data)
            box = box_of(crop, height, width)
            with self.decoder.holding(height * width):
                return cut(data, size, box), height, width
        except ValueError as error:
            status = 413 if "decompression bomb" in str(error) else 415
            raise HTTPException(status, f"The image cannot be read: {error}.") from error


async def _service_of(request: Request) -> Service:
    return request.app.state.service


Served = Annotated[Service, Depends(_service_of)]


def box_of(crop: str | None, height: int, width: int) -> Box | None:
    """Reads "x,y,width,height" in fractions of an image as a box in its pixels.

    HTTPException 422: it is something else, lies outside of the image, or is empty.
    """
    if crop is None:
        return None
    try:
        x, y, w, h = map(float, crop.split(","))
    except ValueError:
        x = y = w = h = math.nan
    right, lower = x + w, y + h
    if not (0 <= x <= right <= 1 + 1e-6 and 0 <= y <= lower <= 1 + 1e-6):  # false for NaN
        raise HTTPException(
            422, "crop: give x,y,width,height as fractions of the image: 0.25,0.1,0.5,0.5."
        )
    x0, y0, x1, y1 = x * width, y * height, min(right, 1) * width, min(lower, 1) * height
    if x0 >= x1 or y0 >= y1:
        raise HTTPException(422, f"crop={crop}: this part of the image is empty.")
    return x0, y0, x1, y1


def file_of(record: Record) -> bytes | None:
    """Returns the file of an indexed image, if it is still what was indexed; else None."""
    path = Path(record.path)
    with contextlib.suppress(OSError, ValueError):
        if record.path and path.is_file() and path.stat().st_size == record.size:
            data = path.read_bytes()
            if hash_of(data) == record.hash:
                return data
    return None
