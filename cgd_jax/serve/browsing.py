"""The collection: its images in pages, its folders, and what lies in it twice."""

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from cgd_jax.search import collection, stores
from cgd_jax.search.duplicates import SIMILARITY, find_duplicates
from cgd_jax.search.stores import COLUMNS, Record
from cgd_jax.serve.filters import Filtered
from cgd_jax.serve.service import Served, Shown
from cgd_jax.serve.showing import Details, details_of

__all__ = ["router"]

GROUPS, COPIES = 1000, 100  # that are shown, and of one group, at most
router = APIRouter(tags=["collection"])


class Listing(BaseModel):
    """Some of the images that filters let through."""

    total: int = Field(description="images that the filters let through")
    folders: dict[str, int] = Field(description="those directly below, and images in each of them")
    images: list[Shown]


@router.get("/collection")
async def listing(
    service: Served,
    filters: Filtered,
    order: Literal["newest", "folder"] = "newest",
    k: Annotated[int, Query(ge=0, le=500)] = 100,
    offset: Annotated[int, Query(ge=0)] = 0,
) -> Listing:
    """Lists the images, the newest first or by folder and name."""
    return await asyncio.to_thread(_listing, service, filters, order, k, offset)


def _listing(service, filters, order, k, offset) -> Listing:
    root = service.root()
    table = service.listing(filters.where(root), order)
    page = table.slice(offset, k).select(stores.HIT_COLUMNS).to_pylist()
    rows = [stores.Hit(similarity=0, **row) for row in page]
    inside = collection.inside(root, filters.folder or "")
    folders = collection.folders_below(table, inside) if offset == 0 else {}
    images = [Shown(**one) for one in service.shown(rows, root)]
    return Listing(total=len(table), folders=folders, images=images)


class Copy(Details):
    """One of several images that are nearly the same."""

    similarity: float = Field(description="to the nearest in the group")
    best: bool = Field(description="the most pixels, then bytes, then the earliest")


class Alike(BaseModel):
    """Images that are nearly the same."""

    size: int
    copies: list[Copy] = Field(description=f"the best first, {COPIES} at most")


class Duplicates(BaseModel):
    """Groups of images that are nearly the same."""

    groups: list[Alike] = Field(description=f"{GROUPS} at most")
    total: int = Field(description="groups that there are")


@router.get("/duplicates")
async def duplicates(
    service: Served,
    filters: Filtered,
    similarity: Annotated[float, Query(gt=0, le=1)] = SIMILARITY,
) -> Duplicates:
    """Finds images that are nearly the same; compares all with all, which takes its time."""
    async with service.gate():
        return await service.comparer.run(_duplicates, service, filters, similarity)


def _duplicates(service, filters, similarity) -> Duplicates:
    root, store = service.root(), service.index.store
    found = find_duplicates(service.index, similarity, filters.where(root))
    shown = [group.members[:COPIES] for group in found[:GROUPS]]
    ids = [hit.id for members in shown for hit in members]
    names, records = [name for name in COLUMNS if name != "thumbnail"], {}
    for at in range(0, len(ids), 1000):
        for batch in store.read(names, stores.among(ids[at : at + 1000])):
            records |= {row["id"]: Record(**row) for row in batch.to_pylist()}
    groups = []
    for group, members in zip(found, shown, strict=False):
        there = [(records[hit.id], hit.similarity) for hit in members if hit.id in records]
        there.sort(key=lambda one: (-one[0].width * one[0].height, -one[0].size, one[0].modified))
        copies = [
            Copy(similarity=alike, best=i == 0, **details_of(service, record, root))
            for i, (record, alike) in enumerate(there)
        ]
        groups.append(Alike(size=len(group.members), copies=copies))
    return Duplicates(groups=groups, total=len(found))
