"""POST /search: the images most similar to one, or to several; GET /explanation: why they are."""

import contextlib
import itertools
import time
from typing import Annotated

import numpy as np
from fastapi import APIRouter, HTTPException, Query, Request
from pydantic import BaseModel, Field

from cgd_jax.serve.browsing import Filters
from cgd_jax.serve.service import Served, Service, Shown, run
from cgd_jax.serve.uploads import PREFIX

FARTHEST = 1000  # a search goes no farther than this rank
EXAMPLES = 8  # images of a query
IMAGE_BODY = {
    "requestBody": {
        "description": "The bytes of an image, as they are; it joins those of `id`.",
        "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
    }
}
Id = Annotated[str, Query(max_length=200, description="of an indexed image or of an upload")]
router = APIRouter(tags=["search"])


class Asked(Filters):
    """What a search is asked for."""

    id: str = Field(
        "", max_length=400, description=f"of images or uploads: A,B; {EXAMPLES} at most"
    )
    crop: str = Field(
        "",
        max_length=800,
        description="The parts to search by: x,y,width,height as fractions of an image; of several "
        "images with ; between, and nothing for a whole one.",
    )
    others: bool = Field(False, description="finds all but the query itself")
    similarity: float = Field(-1, ge=-1, le=1, description="the least")
    k: int = Field(20, ge=1, le=200)
    offset: int = Field(0, ge=0, lt=FARTHEST)


class Answer(BaseModel):
    """What a search found."""

    query: str = Field(description="ids of the query; an upload is kept for a while")
    hits: list[Shown] = Field(description="most similar first")
    more: bool = Field(description="whether a larger offset finds more")
    searched: int = Field(description="images that were searched")
    exact: bool = Field(description="whether every image was compared")
    milliseconds: float = Field(description="to decode, embed and search, without the upload")


@router.post("/search", openapi_extra=IMAGE_BODY)
async def search(request: Request, service: Served, asked: Annotated[Asked, Query()]) -> Answer:
    """Finds the images most similar to those of some ids, and to the one in the body.

    By several images it searches with the mean of their vectors, normalized.
    """
    headers = request.headers
    sent = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    body = service.uploads.received(request) if sent or not asked.id else contextlib.nullcontext()
    async with body as data:
        # No gate before the body is there, which may take long.
        return await service.work(_answer, service, asked, data, gated=True)


def _answer(service: Service, asked: Asked, data: bytes | None) -> Answer:
    begin = time.perf_counter()
    ids = asked.id.split(",") if asked.id else []
    if data:
        ids.append(service.uploads.keep(data))
    vector = vector_of(service, ids, asked.crop.split(";"))
    images, last = service.collection(), min(asked.offset + asked.k, FARTHEST)
    # An upload is told by its content.
    itself = [("hash" if PREFIX in id else "id", id.removeprefix(PREFIX)) for id in ids]
    found, searched, exact = images.search(
        vector, last, asked.where(images.root), itself if asked.others else []
    )
    near = [one for one in found if one[1] >= asked.similarity]
    return Answer(
        query=",".join(ids),
        hits=[service.shown(record, images.root, alike) for record, alike in near[asked.offset :]],
        more=len(near) == last < min(FARTHEST, searched),
        searched=searched,
        exact=exact,
        milliseconds=round(1e3 * (time.perf_counter() - begin), 1),
    )


def vector_of(service: Service, ids: list[str], crops: list[str]) -> np.ndarray:
    """Returns the mean vector [D] of images or parts of them; HTTPException 422, too many."""
    if len(ids) > EXAMPLES or len(crops) > len(ids):
        raise HTTPException(422, f"Search by {EXAMPLES} images at most, with a crop each or none.")
    vectors = [service.vector(*one) for one in itertools.zip_longest(ids, crops, fillvalue="")]
    return np.mean([vector / np.linalg.norm(vector) for vector in vectors], axis=0)


class Explanation(BaseModel):
    """What the regions of two images add to their similarity."""

    query: list[list[float]] = Field(description="rows of the grid over the query")
    match: list[list[float]] = Field(description="rows of the grid over the other image")
    inset: float = Field(description="side of the grid, in the middle, as a part of the image's")


@router.get("/explanation")
async def explanation(
    service: Served, query: Id, match: Id, crop: Annotated[str, Query(max_length=100)] = ""
) -> Explanation:
    """Says where two images are alike; the crop is the query's."""
    if not service.heat.possible:
        raise HTTPException(404, "The vectors of this index cannot be explained.")
    ours = await service.work(service.pixels, query, crop)
    theirs = await service.work(service.pixels, match)
    maps = await run(service.explainer, service.heat.maps, np.stack([ours, theirs]))
    grids = maps.round(6).tolist()
    return Explanation(query=grids[0], match=grids[1], inset=service.heat.inset)
