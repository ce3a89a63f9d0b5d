"""POST /search: the images most similar to one, or to several."""

import asyncio
import contextlib
import time
from typing import Annotated

import numpy as np
from fastapi import APIRouter, HTTPException, Query, Request
from pydantic import BaseModel, Field

from cgd_jax.search import stores
from cgd_jax.serve.filters import Filtered
from cgd_jax.serve.service import Served, Shown
from cgd_jax.serve.uploads import PREFIX

__all__ = ["router"]

FARTHEST = 1000  # a search goes no farther than this rank
EXAMPLES = 8  # images of a query
IMAGE_BODY = {
    "requestBody": {
        "description": "The bytes of an image, as they are; it joins those of `id`.",
        "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
    }
}
router = APIRouter(tags=["search"])


class Match(Shown):
    """An image that was found."""

    similarity: float = Field(description="cosine of the two vectors")


class Answer(BaseModel):
    """What a search found."""

    query: str = Field(description="ids of the query; an upload is kept for a while")
    hits: list[Match] = Field(description="most similar first")
    more: bool = Field(description="whether a larger offset finds more")
    searched: int = Field(description="images that were searched")
    exact: bool = Field(description="whether every image was compared")
    milliseconds: float = Field(description="to decode, embed and search, without the upload")


@router.post("/search", openapi_extra=IMAGE_BODY)
async def search(
    request: Request,
    service: Served,
    filters: Filtered,
    id: Annotated[
        str,
        Query(max_length=400, description=f"of images or uploads, {EXAMPLES} at most: ID,ID"),
    ] = "",
    crop: Annotated[
        str,
        Query(
            max_length=800,
            description="The parts to search by: x,y,width,height as fractions of an image; of "
            "several images with ; between, and nothing for a whole one.",
        ),
    ] = "",
    others: Annotated[bool, Query(description="finds all but the query itself")] = False,
    similarity: Annotated[float, Query(ge=-1, le=1, description="the least")] = -1,
    k: Annotated[int, Query(ge=1, le=200)] = 20,
    offset: Annotated[int, Query(ge=0, lt=FARTHEST)] = 0,
    exact: bool = False,
) -> Answer:
    """Finds the images most similar to those of some ids, and to the one in the body.

    By several images it searches with the mean of their vectors, normalized.
    """
    last, headers = min(offset + k, FARTHEST), request.headers
    sent = not id or headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    body = service.uploads.received(request) if sent else contextlib.nullcontext(b"")
    async with body as data:
        async with service.gate():  # not before the body is there, which may take long
            begin = time.perf_counter()
            ids = id.split(",") if id else []
            ids += [await asyncio.to_thread(service.uploads.keep, data)] if sent else []
            vector = await vector_of(service, ids, crop.split(";"))
            itself = [part for one in ids for part in not_itself(one)] if others else []
            # An exact search may read all vectors into memory: one at a time.
            run = service.device.run if exact else asyncio.to_thread
            hits, known = await run(_found, service, vector, last, filters, itself, exact)
    near = [hit for hit in hits if hit["similarity"] >= similarity]
    return Answer(
        query=",".join(ids),
        hits=[Match(**hit) for hit in near[offset:]],
        more=len(near) == last < min(FARTHEST, known["searched"]),
        milliseconds=round(1e3 * (time.perf_counter() - begin), 1),
        **known,
    )


def _found(service, vector, last, filters, itself, exact) -> tuple[list[dict], dict]:
    """Returns hits, as they are shown, and how they were found; in a thread."""
    index, root = service.index, service.root()
    where = filters.where(root, *itself)
    (hits,) = index.search_vectors(vector[None], last, where, exact)
    store = index.store
    shown = [
        {"similarity": hit.similarity, **one}
        for hit, one in zip(hits, service.shown(hits, root), strict=True)
    ]
    return shown, {"searched": store.count(where), "exact": exact or not store.approximate()}


async def vector_of(service: Served, ids: list[str], crops: list[str]) -> np.ndarray:
    """Returns the mean vector [D] of images or parts of them; HTTPException 422, too many."""
    if len(ids) > EXAMPLES or len(crops) > len(ids):
        raise HTTPException(
            422, f"Search by {EXAMPLES} images at most, with no more crops than images."
        )
    crops += [""] * (len(ids) - len(crops))
    one = (service.vector(i, crop or None) for i, crop in zip(ids, crops, strict=True))
    vectors = await asyncio.gather(*one)
    return np.mean([vector / np.linalg.norm(vector) for vector in vectors], axis=0)


def not_itself(id: str) -> list[str]:
    """Returns the condition that an image is not that of an id; of an upload, not the same file."""
    if id.startswith(PREFIX):
        return [f"hash <> {stores.quoted(id.removeprefix(PREFIX))}"]
    return [f"id <> {stores.quoted(id)}"]
