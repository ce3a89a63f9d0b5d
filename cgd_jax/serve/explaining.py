"""GET /explanation: where two images are alike."""

from typing import Annotated

import numpy as np
from fastapi import APIRouter, HTTPException, Query
from pydantic import BaseModel, Field

from cgd_jax.serve.service import Served, run

Id = Annotated[str, Query(max_length=200, description="of an indexed image or of an upload")]
router = APIRouter(tags=["explanation"])


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
    async with service.gate():
        ours = await run(service.workers, service.pixels, query, crop)
        theirs = await run(service.workers, service.pixels, match)
        maps = await run(service.explainer, service.heat.maps, np.stack([ours, theirs]))
    grids = maps.round(6).tolist()
    return Explanation(query=grids[0], match=grids[1], inset=service.heat.inset)
