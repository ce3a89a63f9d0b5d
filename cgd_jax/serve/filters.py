"""Which images are looked at: parameters that searches, the collection and duplicates share."""

from datetime import date
from typing import Literal

from pydantic import BaseModel, Field

from cgd_jax.search import collection, stores

__all__ = ["Filters"]

SHAPES = {"landscape": "width > height", "portrait": "width < height", "square": "width = height"}


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
