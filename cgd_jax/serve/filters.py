"""Which images are looked at: parameters that searches, the collection and duplicates share."""

from dataclasses import dataclass
from datetime import date
from typing import Annotated, Literal

from fastapi import Depends, Query

from cgd_jax.search import collection, stores

__all__ = ["Filtered", "Filters"]

SHAPES = {"landscape": "width > height", "portrait": "width < height", "square": "width = height"}


@dataclass(frozen=True)
class Filters:
    """What an image must be; what is None may be anything."""

    folder: Annotated[
        str | None, Query(max_length=4000, description="below the collection, at any depth: a/b")
    ] = None
    label: Annotated[str | None, Query(max_length=1000)] = None
    after: Annotated[date | None, Query(description="this day or later")] = None
    before: Annotated[date | None, Query(description="this day or earlier")] = None
    pixels: Annotated[int | None, Query(ge=1, le=10**6, description="of the longer side")] = None
    orientation: Literal["landscape", "portrait", "square"] | None = None

    def where(self, root: str, *others: str) -> str | None:
        """Returns them as one condition, with others; `root` is that of the collection."""
        parts = [*others, *collection.between(self.after, self.before)]
        if self.folder:
            parts.append(collection.below(collection.inside(root, self.folder)))
        if self.label is not None:
            parts.append(f"label = {stores.quoted(stores.composed(self.label) or '')}")
        if self.pixels is not None:
            parts.append(f"(width >= {self.pixels} OR height >= {self.pixels})")
        if self.orientation is not None:
            parts.append(SHAPES[self.orientation])
        return " AND ".join(parts) or None


Filtered = Annotated[Filters, Depends()]
