"""The collection: its images in pages, its folders, and what lies in it twice."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from cgd_jax.search.duplicates import SIMILARITY, find_duplicates
from cgd_jax.serve.filters import Filters
from cgd_jax.serve.service import Served, Service, Shown, run

GROUPS, COPIES = 1000, 100  # that are shown, and of one group, at most
router = APIRouter(tags=["collection"])


class Page(Filters):
    """Which images are listed."""

    order: Literal["newest", "folder"] = "newest"
    k: int = Field(100, ge=0, le=500)
    offset: int = Field(0, ge=0)


class Listing(BaseModel):
    """Some of the images that filters let through."""

    total: int = Field(description="images that the filters let through")
    folders: dict[str, int] = Field(description="those directly below, and images in each of them")
    images: list[Shown]


@router.get("/collection")
def listing(service: Served, page: Annotated[Page, Query()]) -> Listing:
    """Lists the images, the newest first or by folder and name."""
    images = service.collection()
    rows = images.listed(page.where(images.root), page.order)
    shown = [
        Shown(**service.shown(record, images.root))
        for record in images.records(rows[page.offset : page.offset + page.k])
    ]
    folders = {} if page.offset else images.folders_below(rows, page.folder)
    return Listing(total=len(rows), folders=folders, images=shown)


class Compared(Filters):
    """Which images are compared with each other."""

    similarity: float = Field(SIMILARITY, gt=0, le=1)


class Copy(Shown):
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
async def duplicates(service: Served, asked: Annotated[Compared, Query()]) -> Duplicates:
    """Finds images that are nearly the same; compares all with all, which takes its time."""
    async with service.gate():
        return await run(service.comparer, _duplicates, service, asked)


def _duplicates(service: Service, asked: Compared) -> Duplicates:
    images = service.collection()
    found = find_duplicates(service.index, asked.similarity, asked.where(images.root))
    groups = []
    for group in found[:GROUPS]:
        similarity = {
            one.id: one.similarity for one in group.members[:COPIES] if one.id in images.rows
        }
        records = images.records([images.rows[id] for id in similarity])
        records.sort(key=lambda one: (-one.width * one.height, -one.size, one.modified))
        copies = [
            Copy(similarity=similarity[one.id], best=i == 0, **service.shown(one, images.root))
            for i, one in enumerate(records)
        ]
        groups.append(Alike(size=len(group.members), copies=copies))
    return Duplicates(groups=groups, total=len(found))
