"""The API: what is asked, and the type of every answer."""

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, HTTPException, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from cgd_jax.search import stores
from cgd_jax.serve.service import Served
from cgd_jax.serve.uploads import MAX_BYTES, PREFIX

__all__ = ["describing", "explaining", "searching", "showing"]

FARTHEST = 1000  # a search goes no farther than this rank
SIDES = {"small": 192, "large": 1024}  # pixels, the longer side of what is shown
IMAGE_BODY = {
    "requestBody": {
        "description": "The bytes of an image, as they are; none if an id is given.",
        "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
    }
}
Id = Annotated[str, Query(max_length=200, description="of an indexed image or of an upload")]
Crop = Annotated[
    str | None,
    Query(
        max_length=100,
        description="The part of the query to search by: x,y,width,height as fractions of it.",
    ),
]
searching = APIRouter(tags=["search"])
showing = APIRouter(tags=["images"])
explaining = APIRouter(tags=["explanation"])
describing = APIRouter(tags=["about"])


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
    searched: int = Field(description="images that were searched")
    exact: bool = Field(description="whether every image was compared")
    milliseconds: float = Field(description="to decode, embed and search, without the upload")


@searching.post("/search", openapi_extra=IMAGE_BODY)
async def search(
    request: Request,
    service: Served,
    id: Id | None = None,
    crop: Crop = None,
    label: Annotated[str | None, Query(max_length=1000)] = None,
    k: Annotated[int, Query(ge=1, le=200)] = 20,
    offset: Annotated[int, Query(ge=0, lt=FARTHEST)] = 0,
    exact: bool = False,
) -> Answer:
    """Finds the images most similar to the one in the body, or to that of an id."""
    index, last = service.index, min(offset + k, FARTHEST)
    where = None if label is None else f"label = {stores.quoted(label)}"
    body = service.uploads.received(request) if id is None else contextlib.nullcontext(b"")
    async with body as data:
        async with service.gate():  # not before the body is there, which may take long
            begin = time.perf_counter()
            query = await asyncio.to_thread(service.uploads.keep, data) if id is None else id
            vector = await service.vector(query, crop)
            # An exact search may read all vectors into memory: one at a time.
            run = service.device.run if exact else asyncio.to_thread
            (hits,) = await run(index.search_vectors, vector[None], last, where, exact)
            elapsed = 1e3 * (time.perf_counter() - begin)
            searched = await asyncio.to_thread(index.count, where)
            approximate = await asyncio.to_thread(lambda: index.store.approximate())
    hidden = {} if service.show_paths else {"path": None}
    return Answer(
        query=query,
        hits=[Match(**hit._asdict() | hidden) for hit in hits[offset:]],
        more=len(hits) == last < min(FARTHEST, searched),
        searched=searched,
        exact=exact or not approximate,
        milliseconds=round(elapsed, 1),
    )


@showing.get(
    "/image/{id}",
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {}}, "description": "a JPEG"}},
)
async def image(service: Served, id: str, size: Literal["small", "large"] = "small") -> Response:
    """Shows an image of the index, or an upload, with at most 192 or 1024 pixels a side."""
    if size == "small" and not id.startswith(PREFIX):
        content = (await asyncio.to_thread(service.record, id)).thumbnail
    else:
        content = await service.decoder.run(service.shown, id, SIDES[size])
    return Response(content, 200, {"Cache-Control": "private, max-age=300"}, "image/jpeg")


class Explanation(BaseModel):
    """What the regions of two images add to their similarity."""

    query: list[list[float]] = Field(description="rows of the grid over the query")
    match: list[list[float]] = Field(description="rows of the grid over the other image")
    inset: float = Field(description="side of the grid, in the middle, as a part of the image's")


@explaining.get("/explanation")
async def explanation(service: Served, query: Id, match: Id, crop: Crop = None) -> Explanation:
    """Says where two images are alike; the crop is the query's."""
    if not service.heat.possible:
        raise HTTPException(404, "The vectors of this index cannot be explained.")
    async with service.gate():
        ours = await service.decoder.run(service.pixels, query, crop)
        theirs = await service.decoder.run(service.pixels, match)
        maps = await service.explainer.run(service.heat.maps, np.stack([ours, theirs]))
    grids = maps.round(6).tolist()
    return Explanation(query=grids[0], match=grids[1], inset=service.heat.inset)


class About(BaseModel):
    """What is searched."""

    images: int
    labels: dict[str, int] = Field(description="images of every label")
    network: str
    explains: bool = Field(description="whether GET /explanation answers")
    max_bytes: int = Field(description="of an upload")


class Health(BaseModel):
    """Whether searches would be answered."""

    status: Literal["ok"] = "ok"


@describing.get("/about")
def about(service: Served) -> About:
    """Says what is searched."""
    name = service.index.info.network
    return About(
        images=service.index.count(),
        labels=service.labels(),
        network=name if service.show_paths else Path(name).name,
        explains=service.heat.possible,
        max_bytes=MAX_BYTES,
    )


@describing.get("/healthz")
def health(service: Served) -> Health:
    """Says that the server and its index answer; needs no token."""
    service.index.count()
    return Health()
