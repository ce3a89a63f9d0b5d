"""What is served, and how it is kept like its files."""

from pathlib import Path
from typing import Literal

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, Field

from cgd_jax.serve.service import Served
from cgd_jax.serve.updating import Update
from cgd_jax.serve.uploads import MAX_BYTES

router = APIRouter(tags=["about"])


class About(BaseModel):
    """What is searched."""

    images: int
    labels: dict[str, int] = Field(description="images of every label")
    network: str
    explains: bool = Field(description="whether GET /explanation answers")
    files: bool = Field(description="whether paths are shown, files sent, and updates made")
    max_bytes: int = Field(description="of an upload")
    update: Update


@router.get("/about")
def about(service: Served) -> About:
    """Says what is searched, and how far an update is."""
    name = service.index.info.network
    return About(
        images=service.index.count(),
        labels=service.collection().labels,
        network=name if service.show_paths else Path(name).name,
        explains=service.heat.possible,
        files=service.show_paths,
        max_bytes=MAX_BYTES,
        update=service.updater.update,
    )


@router.post("/update")
def update(service: Served) -> Update:
    """Begins to bring the index up to date with the files that it was made from."""
    if not service.show_paths:
        raise HTTPException(403, "The index is updated on the server's own machine only.")
    return service.updater.begin()


@router.get("/healthz")
def health(service: Served) -> dict[Literal["status"], Literal["ok"]]:
    """Says that the server and its index answer; needs no token."""
    service.index.count()
    return {"status": "ok"}
