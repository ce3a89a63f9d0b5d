"""The collection: its images by filters and in pages, its folders, what is in it twice."""

from datetime import date
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from cgd_jax.search import collection, stores
from cgd_jax.search.duplicates import SIMILARITY, find_duplicates
from cgd_jax.serve.service import Served, Service, Shown, run

GROUPS, COPIES = 1000, 100  # that are shown, and of one group, at most
SHAPES = {"landscape": "width > height", "portrait": "width < height", "square": "width = height"}
router = APIRouter(tags=["collection"])


class Filters(BaseModel):
    """What an image must be; what is None may be anything."""

    folder: str = Field("", max_length=4000, description="below the collection, at any depth: a/b")
    label: str | None = Field(None, max_length=1000)
    after: date | None = Field(None, description="this day or later")
    before: date | None = Field(None, description="this day or earlier")
    pixels: int | None = Field(None, ge=1, le=10**6, description="of the longer side")
    orientation: Literal["landscape", "portrait", "square"] | None = None

    def where(self, root: str) -> str | None:
        """Returns them as one condition; `root` is that of the collection."""
        parts = collection.between(self.after, self.before)
        if self.folder:
            parts.append(collection.below(collection.inside(root, self.folder)))
        if self.label is not None:
            parts.append(f"label = {stores.quoted(stores.composed(self.label) or '')}")
        if self.pixels is not None:
            parts.append(f"(width >= {self.pixels} OR height >= {self.pixels})")
        if self.orientation is not None:
            parts.append(SHAPES[self.orientation])
        return " AND ".join(parts) or None


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
    records = images.records(rows[page.offset : page.offset + page.k])
    folders = {} if page.offset else images.folders_below(rows, page.folder)
    shown = [service.shown(record, images.root) for record in records]
    return Listing(total=len(rows), folders=folders, images=shown)


class Compared(Filters):
    """Which images are compared with each other."""

    similarity: float = Field(SIMILARITY, gt=0, le=1)


class Alike(BaseModel):
    """Images that are nearly the same."""

    size: int
    copies: list[Shown] = Field(description=f"the one with the most pixels first; at most {COPIES}")


class Duplicates(BaseModel):
    """Groups of images that are nearly the same."""

    groups: list[Alike] = Field(description=f"{GROUPS} at most")
    total: int = Field(description="groups that there are")


@router.get("/duplicates")
async def duplicates(service: Served, asked: Annotated[Compared, Query()]) -> Duplicates:
    """Finds images that are nearly the same; compares all with all, which takes its time."""
    return await run(service.comparer, _duplicates, service, asked)


def _duplicates(service: Service, asked: Compared) -> Duplicates:
    images = service.collection()
    found = find_duplicates(service.index, asked.similarity, asked.where(images.root))
    groups = []
    for group in found[:GROUPS]:
        near = {one.id: one.similarity for one in group.members[:COPIES] if one.id in images.rows}
        records = images.records([images.rows[id] for id in near])
        records.sort(key=lambda one: (-one.width * one.height, -one.size, one.modified))
        copies = [service.shown(record, images.root, near[record.id]) for record in records]
        groups.append(Alike(size=len(group.members), copies=copies))
    return Duplicates(groups=groups, total=len(found))
