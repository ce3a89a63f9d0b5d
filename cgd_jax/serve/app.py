"""The application: a page to search by pictures, and the JSON API that the page uses.

    app = create_app(Index.open("runs/index"))

Any ASGI server runs it; `command.serve` does so with uvicorn. Original files are never sent:
what is shown is a thumbnail of the index, or a JPEG made here of what was decoded. A path is
taken from the index only, and its file is used only while its content is what was indexed.
"""

import asyncio
import math
import os
import threading
import time
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import simplejpeg
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from cgd_jax.data.decode import decode, dimensions
from cgd_jax.data.images import Box
from cgd_jax.search import Index, StoreError, stores
from cgd_jax.search.images import hash_of
from cgd_jax.serve import uploads
from cgd_jax.serve.device import Device, Gate
from cgd_jax.serve.guard import Guard
from cgd_jax.serve.heat import Heat

__all__ = ["create_app"]

VECTORS = 1000  # of uploads that are remembered
CAPACITY = 32  # searches at once; more are refused
FARTHEST = 1000  # a search goes no farther than this rank
SIDES = {"small": 192, "large": 1024}  # pixels, the longer side of what is shown
QUALITY = 85  # of its JPEG
STATIC = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
PICTURE_BODY = {
    "requestBody": {
        "description": "The bytes of a picture, as they are; none if an id is given.",
        "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
    }
}
Id = Annotated[str, Query(max_length=200, description="of an indexed picture or of an upload")]
Crop = Annotated[
    str | None,
    Query(
        max_length=100,
        description="The part of the query to search by: x,y,width,height as fractions of it.",
        examples=["0.25,0.1,0.5,0.5"],
    ),
]


class Refusal(BaseModel):
    """Why a request was not answered."""

    detail: str


class Match(BaseModel):
    """An image that was found; every field of `stores.Hit`."""

    model_config = ConfigDict(extra="allow")
    id: str
    similarity: float = Field(description="cosine of the two vectors")
    label: str | None
    path: str | None = Field(None, description="only if the server was told to show paths")


class Answer(BaseModel):
    """What a search found."""

    query: str = Field(description="id of the query, under which an upload is kept for a while")
    hits: list[Match] = Field(description="most similar first")
    more: bool = Field(description="whether a larger offset finds more")
    searched: int = Field(description="pictures that were searched")
    exact: bool = Field(description="whether every picture was compared")
    milliseconds: float = Field(description="to decode, embed and search, without the upload")


class Explanation(BaseModel):
    """What the regions of two pictures add to their similarity."""

    query: list[list[float]] = Field(description="rows of the grid over the query")
    match: list[list[float]] = Field(description="rows of the grid over the other picture")
    inset: float = Field(description="side of the grid, in the middle, as a part of the picture's")


class About(BaseModel):
    """What is searched."""

    images: int
    labels: dict[str, int] = Field(description="pictures of every label")
    network: str
    explains: bool = Field(description="whether GET /explanation answers")
    max_bytes: int = Field(description="of an upload")


class Health(BaseModel):
    """Whether searches would be answered."""

    status: Literal["ok"] = "ok"


def create_app(
    index: Index,
    *,
    token: str | None = None,
    show_paths: bool = False,
    capacity: int = CAPACITY,
    max_bytes: int = uploads.MAX_BYTES,
) -> FastAPI:
    """Makes the application.

    Args:
      index: to search.
      token: what a client has to know; None answers everybody who can reach the server, under
        a name of this machine.
      show_paths: whether answers tell where pictures lie.
      capacity: searches at once; further ones are answered 503.
      max_bytes: of an upload.
    """
    app = FastAPI(
        title="Picture search",
        description="Finds the pictures of an index that are most similar to a given one.",
        # The pages that show an OpenAPI description load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        responses={
            404: {"model": Refusal, "description": "No such picture"},
            503: {"model": Refusal, "description": "Too many requests, or the index is away"},
        },
    )
    app.add_middleware(Guard, token=token)
    kept = uploads.Uploads()
    gate = Gate(capacity)
    device = Device(index.embed_pixels, batch_size=16)
    heat, explaining = Heat(index), asyncio.Lock()
    decoding = threading.BoundedSemaphore(os.cpu_count() or 1)  # each may take 150 MB
    summary = Summary(index)
    vectors: dict[tuple[str, str | None], np.ndarray] = {}  # of uploads, whose results are paged

    def pixels_of(data: bytes, crop: str | None = None) -> np.ndarray:
        with decoding:
            try:
                return decode(data, box_of(crop, *dimensions(data)), index.info.resize)
            except ValueError as error:
                raise uploads.unreadable(error) from error

    def content_of(id: str) -> bytes:
        """Returns an upload, or the file of an indexed picture, or else its thumbnail."""
        if id.startswith(uploads.PREFIX):
            if (data := kept.get(id)) is None:
                raise HTTPException(404, "This upload is no longer kept; upload it again.")
            return data
        return file_of(index, id) or thumbnail_of(index, id)

    def accept(data: bytes, crop: str | None) -> tuple[str, np.ndarray]:
        uploads.check_picture(data)
        pixels = pixels_of(data, crop)
        return kept.keep(data), pixels

    def remember(id: str, crop: str | None, vector: np.ndarray) -> np.ndarray:
        if id.startswith(uploads.PREFIX):  # of a content, which does not change
            vectors[id, crop] = vector
            while len(vectors) > VECTORS:
                del vectors[next(iter(vectors))]
        return vector

    async def vector_for(id: str, crop: str | None) -> np.ndarray:
        if crop is None and not id.startswith(uploads.PREFIX):
            return await asyncio.to_thread(vector_of, index, id)
        if (id, crop) in vectors:
            return vectors[id, crop]
        content = await asyncio.to_thread(content_of, id)
        pixels = await asyncio.to_thread(pixels_of, content, crop)
        return remember(id, crop, await device.embed(pixels))

    @app.post(
        "/search",
        openapi_extra=PICTURE_BODY,
        responses={413: {"model": Refusal}, 415: {"model": Refusal}},
    )
    async def search(
        request: Request,
        id: Id | None = None,
        crop: Crop = None,
        label: Annotated[str | None, Query(max_length=1000)] = None,
        k: Annotated[int, Query(ge=1, le=200)] = 20,
        offset: Annotated[int, Query(ge=0, lt=FARTHEST)] = 0,
        exact: bool = False,
    ) -> Answer:
        """Finds the pictures most similar to the one in the body, or to that of an id."""
        with gate.entered():
            if id is None:
                data = await uploads.read_body(request, max_bytes)
                begin = time.perf_counter()
                query, pixels = await asyncio.to_thread(accept, data, crop)
                vector = remember(query, crop, await device.embed(pixels))
            else:
                begin = time.perf_counter()
                query, vector = id, await vector_for(id, crop)
            last = min(offset + k, FARTHEST)
            where = None if label is None else f"label = {stores.quoted(label)}"
            # An exact search may read all vectors into memory: one at a time.
            run = device.run if exact else asyncio.to_thread
            found = await run(index.search_vectors, vector[None], last, where, exact)
            elapsed = 1e3 * (time.perf_counter() - begin)
            searched = await asyncio.to_thread(index.count, where)
        hits = [
            Match(**hit._asdict() | ({} if show_paths else {"path": None}))
            for hit in found[0][offset:]
        ]
        return Answer(
            query=query,
            hits=hits,
            more=len(found[0]) == last < min(FARTHEST, searched),
            searched=searched,
            exact=exact or not summary.approximate(),
            milliseconds=round(elapsed, 1),
        )

    @app.get(
        "/image/{id}",
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {}}, "description": "a JPEG"}},
    )
    def image(id: str, size: Literal["small", "large"] = "small") -> Response:
        """Shows a picture of the index, or an upload, with at most 192 or 1024 pixels a side."""
        if size == "small" and not id.startswith(uploads.PREFIX):
            content = thumbnail_of(index, id)
        else:
            data = content_of(id)
            with decoding:
                try:
                    content = shown(data, SIDES[size])
                except ValueError as error:
                    raise uploads.unreadable(error) from error
        return Response(content, 200, {"Cache-Control": "private, max-age=300"}, "image/jpeg")

    @app.get("/explanation")
    async def explanation(query: Id, match: Id, crop: Crop = None) -> Explanation:
        """Says where two pictures are alike; the crop is the query's."""
        if not heat.possible:
            raise HTTPException(404, "The vectors of this index cannot be explained.")
        with gate.entered():

            def read() -> np.ndarray:
                return np.stack([pixels_of(content_of(query), crop), pixels_of(content_of(match))])

            pixels = await asyncio.to_thread(read)
            async with explaining:  # not on the device's thread: the first one compiles for long
                maps = await asyncio.to_thread(heat.maps, pixels)
        grids = maps.round(6).tolist()
        return Explanation(query=grids[0], match=grids[1], inset=heat.inset)

    @app.get("/about")
    def about() -> About:
        """Says what is searched."""
        name = index.info.network
        return About(
            images=index.count(),
            labels=summary.labels(),
            network=name if show_paths else Path(name).name,
            explains=heat.possible,
            max_bytes=max_bytes,
        )

    @app.get("/healthz")
    def health() -> Health:
        """Says that the server and its index answer; needs no token."""
        index.count()
        return Health()

    @app.exception_handler(StoreError)
    async def index_is_away(request: Request, error: Exception) -> Response:
        return JSONResponse({"detail": "The index cannot be read at the moment."}, 503)

    for path, (name, kind) in STATIC.items():
        _add_file(app, path, name, kind)
    return app


class Summary:
    """What takes long to count and rarely changes: read again when the index has changed."""

    OLDEST = 60  # seconds, where the database cannot say whether it has changed

    def __init__(self, index: Index):
        self._index = index
        self._known: dict[str, tuple[Any, Any]] = {}

    def labels(self) -> dict[str, int]:
        """Counts the pictures of every label."""
        return self._current("labels", self._index.labels)

    def approximate(self) -> bool:
        """Returns whether a search that is not told to be exact is approximate."""
        return self._current("approximate", self._index.store.approximate)

    def _current(self, name: str, read: Any) -> Any:
        version = self._index.store.version()
        state = time.monotonic() // self.OLDEST if version is None else version
        if name not in self._known or self._known[name][0] != state:
            self._known[name] = state, read()
        return self._known[name][1]


def box_of(crop: str | None, height: int, width: int) -> Box | None:
    """Reads "x,y,width,height" in fractions of an image as a box in its pixels.

    Raises:
      HTTPException: 422, it is something else.
    """
    if crop is None:
        return None
    try:
        x, y, w, h = map(float, crop.split(","))
    except ValueError:
        x = y = w = h = math.nan
    x1, y1 = x + w, y + h
    if not (0 <= x < x1 <= 1 + 1e-6 and 0 <= y < y1 <= 1 + 1e-6):  # false for NaN
        raise HTTPException(
            422, "crop: give x,y,width,height as fractions of the picture: 0.25,0.1,0.5,0.5."
        )
    # At least a pixel, so that no box is empty.
    box = (x * width, y * height, min(x1, 1) * width, min(y1, 1) * height)
    return box[0], box[1], max(box[2], box[0] + 1e-3), max(box[3], box[1] + 1e-3)


def vector_of(index: Index, id: str) -> np.ndarray:
    """Returns the vector of an indexed picture; 404 if there is none."""
    try:
        return index.vector(id)
    except KeyError:
        raise HTTPException(404, "The index has no such picture.") from None


def thumbnail_of(index: Index, id: str) -> bytes:
    """Returns the thumbnail of an indexed picture; 404 if there is none."""
    try:
        return index.thumbnail(id)
    except KeyError:
        raise HTTPException(404, "The index has no such picture.") from None


def file_of(index: Index, id: str) -> bytes | None:
    """Returns the file of an indexed picture, if it is here and still what was indexed."""
    record = index.get(id)
    if record is None:
        raise HTTPException(404, "The index has no such picture.")
    path = Path(record.path) if record.path else None
    try:
        if path is None or not path.is_file() or path.stat().st_size != record.size:
            return None
        data = path.read_bytes()
    except (OSError, ValueError):
        return None
    return data if hash_of(data) == record.hash else None


def shown(data: bytes, side: int) -> bytes:
    """Returns a picture as a JPEG whose longer side has at most `side` pixels."""
    height, width = dimensions(data)
    scale = min(1.0, side / max(height, width))
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    square = decode(data, None, max(size))  # of the aspect ratio of a square, until it is resized
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(cv2.resize(square, size, interpolation=cv2.INTER_AREA)),
        quality=QUALITY,
    )


def _add_file(app: FastAPI, path: str, name: str, kind: str) -> None:
    content = resources.files("cgd_jax.serve").joinpath("static", name).read_bytes()

    @app.get(path, include_in_schema=False)
    def file() -> Response:
        return Response(content, 200, {"Cache-Control": "no-cache"}, kind)
