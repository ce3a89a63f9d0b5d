"""What requests share: the index, the latest uploads, and the threads that compute."""

import asyncio
import contextlib
import functools
import math
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import datetime
from threading import Lock, current_thread
from typing import Annotated, TypeVar

import numpy as np
from fastapi import Depends, HTTPException, Request
from pydantic import BaseModel, Field

from cgd_jax.data.decode import MAX_PIXELS, dimensions, effort
from cgd_jax.data.images import Box, cut
from cgd_jax.data.shapes import Size
from cgd_jax.runtime.threads import CORES, Budget
from cgd_jax.search import Index, collection
from cgd_jax.search.heat import Heat
from cgd_jax.search.images import as_jpeg, file_of
from cgd_jax.search.stores import Record
from cgd_jax.serve import uploads

CAPACITY = 32  # searches at once; more are refused
QUICK = 10_000_000  # pixels, as `decode.effort` counts them, that are decoded in some 100 ms
VECTORS = 1000  # of uploads that are remembered
NO_IMAGE = "The index has no such image."
OLDEST = 60  # seconds that images are believed to be all where the database has no versions
# An index that takes so many seconds to read is read again after so many times as long.
SLOW, REST = 0.2, 10
T = TypeVar("T")


class Shown(BaseModel):
    """An image of the index."""

    id: str
    name: str = Field(description="of its file")
    folder: str = Field(description="below the one that holds all images")
    label: str | None
    path: str | None = Field(description="only if the server was told to show paths")
    width: int
    height: int
    bytes: int
    date: datetime = Field(description="by EXIF, else when the file was changed last")
    similarity: float | None = Field(description="cosine, to the query or the nearest duplicate")


class Update(BaseModel):
    """How far an update of the index is."""

    running: bool = False
    done: int = Field(default=0, description="files that were read")
    files: int = Field(default=0, description="files to read; 0 before they are known")
    said: str = Field(default="", description="what became of the last one")


class Service:
    """All that is made once for an index that is served; the routes are its interface."""

    def __init__(self, index: Index, show_paths: bool):
        self.index, self.show_paths = index, show_paths
        self.uploads, self.pixels_at_a_time = uploads.Uploads(), Budget(MAX_PIXELS)
        # Of these, one does all of a search: with more than there are cores, all would be late.
        self._workers = ThreadPoolExecutor(CORES, "worker")
        # For what takes long, which keeps nobody else waiting; the first explanation compiles.
        names = "patient", "explainer", "comparer"
        self._patient, self.explainer, self.comparer = (ThreadPoolExecutor(1, n) for n in names)
        self.heat, self.update = Heat(index), Update()
        self._gate = asyncio.Semaphore(CAPACITY)
        self._vector_of_upload = functools.lru_cache(VECTORS)(self._embed)
        self._collection: collection.Collection | None = None
        self._version, self._reading, self._next = -1.0, Lock(), 0.0

    async def work(self, function: Callable[..., T], *args: object, gated: bool = False) -> T:
        """Calls a function in a worker, and if it takes long, again where it keeps nobody.

        A gate lets in as many as can be served in good time; HTTPException 503.
        """
        if gated and self._gate.locked():
            raise HTTPException(503, "Too many searches at once; try again.", {"Retry-After": "1"})
        try:
            async with self._gate if gated else contextlib.nullcontext():
                return await run(self._workers, function, *args)
        except TakesLong:
            return await run(self._patient, function, *args)

    def collection(self) -> collection.Collection:
        """Returns the images of the index; while a large one changes, as they were moments ago."""
        begin, known = time.monotonic(), self._collection
        version = self.index.store.version() or begin // OLDEST
        fresh = known and (version == self._version or begin < self._next)
        # Whoever comes while they are read takes those that are known.
        if not fresh and self._reading.acquire(blocking=known is None):
            try:
                if self._collection is known:  # nobody has read them meanwhile
                    self._collection = collection.Collection(self.index)
                    took = time.monotonic() - begin
                    self._version, self._next = version, begin + REST * took if took > SLOW else 0
            finally:
                self._reading.release()
        assert self._collection is not None
        return self._collection

    def reread(self) -> None:
        """Lets the images be read again, however long that takes."""
        self._next = 0.0

    def shown(self, image: Record, root: str, similarity: float | None = None) -> Shown:
        """Returns what an answer says of an image; `root` is that of the collection."""
        folder, name = collection.split(image.path, root)
        date = datetime.fromtimestamp((max(image.taken, 0) or image.modified) / 1e9)
        path = image.path if self.show_paths else None
        said = image._asdict() | {"name": name, "folder": folder, "path": path, "date": date}
        return Shown(**said, bytes=image.size, similarity=similarity)

    def record(self, id: str) -> Record:
        """Returns what is known of an indexed image; HTTPException 404 if there is none."""
        record = self.index.get(id)
        if record is None:
            raise HTTPException(404, NO_IMAGE)
        return record

    def vector(self, id: str, crop: str) -> np.ndarray:
        """Returns the vector [D] of an image, or of a part of it; in a worker."""
        if id.startswith(uploads.PREFIX):
            return self._vector_of_upload(id, crop)  # whose content never changes
        if crop:
            return self._embed(id, crop)
        with contextlib.suppress(KeyError):
            return self.index.vector(id)
        raise HTTPException(404, NO_IMAGE)

    def _embed(self, id: str, crop: str) -> np.ndarray:
        return self.index.embed_pixels([self.pixels(id, crop)])[0]

    def pixels(self, id: str, crop: str = "") -> np.ndarray:
        """Decodes an image, or a part of it, to what is embedded; in a worker."""
        return self._decoded(id, crop, self.index.network.size)[0]

    def drawn(self, id: str, side: int) -> bytes:
        """Returns an image as a JPEG whose longer side has at most `side` pixels; likewise."""
        pixels, height, width = self._decoded(id, "", side)
        return as_jpeg(pixels, width, height, side)

    def _decoded(self, id: str, crop: str, size: Size) -> tuple[np.ndarray, int, int]:
        """Decodes an image once: pixels of a size, and the height and width of the whole."""
        if id.startswith(uploads.PREFIX):
            data = self.uploads.get(id)
        else:
            record = self.record(id)
            data = file_of(record) or record.thumbnail
        try:
            if effort(data) > QUICK and not current_thread().name.startswith("patient"):
                raise TakesLong
            height, width = dimensions(data)
            box = box_of(crop, height, width) if crop else None
            with self.pixels_at_a_time.holding(height * width):
                return cut(data, size, box), height, width
        except ValueError as error:
            status = 413 if "decompression bomb" in str(error) else 415
            raise HTTPException(status, f"The image cannot be read: {error}.") from error


class TakesLong(Exception):
    """What a worker leaves to the patient one."""


async def run(threads: Executor, function: Callable[..., T], *args: object) -> T:
    """Calls a function in one of some threads; what is cancelled before is never begun."""
    return await asyncio.get_running_loop().run_in_executor(threads, function, *args)


async def _service_of(request: Request) -> Service:
    return request.app.state.service


Served = Annotated[Service, Depends(_service_of)]


def box_of(crop: str, height: int, width: int) -> Box:
    """Reads "x,y,width,height" in fractions of an image as a box in its pixels.

    HTTPException 422: it is something else, lies outside of the image, or is empty.
    """
    try:
        x, y, w, h = map(float, crop.split(","))
    except ValueError:
        x = y = w = h = math.nan
    x0, y0, x1, y1 = x * width, y * height, min(x + w, 1) * width, min(y + h, 1) * height
    inside = x + w <= 1 + 1e-6 and y + h <= 1 + 1e-6
    if not (inside and 0 <= x0 < x1 and 0 <= y0 < y1):  # also for NaN
        how = "x,y,width,height as fractions of the image, such as 0.25,0.1,0.5,0.5"
        raise HTTPException(422, f"crop={crop} lies outside of the image or is empty; give {how}.")
    return x0, y0, x1, y1
