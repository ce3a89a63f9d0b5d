"""What is served, and how it is kept like its files."""

import logging
from pathlib import Path
from threading import Thread
from typing import Literal

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, Field

from cgd_jax.runtime.errors import UserError
from cgd_jax.serve.service import Served, Service, Update
from cgd_jax.serve.uploads import MAX_BYTES

log = logging.getLogger(__name__)
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
        update=service.update,
    )


@router.post("/update")
async def update(service: Served) -> Update:
    """Begins to bring the index up to date with the files that it was made from."""
    if not service.show_paths:
        raise HTTPException(403, "The index is updated on the server's own machine only.")
    if not service.update.running:
        service.update = Update(running=True)
        Thread(target=_update, args=(service,), daemon=True).start()
    return service.update


def _update(service: Service) -> None:
    def watch(done: int, files: int) -> None:
        service.update = Update(running=True, done=done, files=files)

    index, said = service.index, "The index was made from no folder: there is nothing to update."
    try:
        rows = (batch["source"].to_pylist() for batch in index.store.read(["source"]))
        if sources := sorted({source for batch in rows for source in batch if source}):
            said = f"{index.update(*sources, watch=watch)}."
    except (UserError, OSError) as error:
        said = f"The index was not updated: {error}"
    except Exception:
        log.exception("The index was not updated")
        said = "The index was not updated; the server's output says why."
    service.reread()
    service.update = Update(said=said)


@router.get("/healthz")
def health(service: Served) -> dict[Literal["status"], Literal["ok"]]:
    """Says that the server and its index answer; needs no token."""
    service.index.count()
    return {"status": "ok"}
