"""Images, and what is known of them."""

import asyncio
from datetime import datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, HTTPException, Request, Response
from pydantic import Field

from cgd_jax.search.images import hash_of
from cgd_jax.search.stores import Record
from cgd_jax.serve.service import Served, Shown, file_of
from cgd_jax.serve.uploads import PREFIX

__all__ = ["Details", "details_of", "router"]

SIDES = {"small": 192, "medium": 384, "large": 1024}  # pixels, the longer side of what is shown
AN_IMAGE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/jpeg": {}}, "description": "a JPEG"}
}
A_FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/*": {}}, "description": "the file as it is"}
}
# What browsers show; anything else they are told to save, and not to guess what it is.
KINDS = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png", b"GIF8": "gif", b"RIFF": "webp"}
router = APIRouter(tags=["images"])


class Details(Shown):
    """What is known of an image of the index."""

    width: int
    height: int
    bytes: int
    date: datetime = Field(description="by EXIF, else when the file was changed last")


def details_of(service: Served, record: Record, root: str) -> dict[str, Any]:
    """Returns the fields of `Details` of a record."""
    (shown,) = service.shown([record], root)
    date = datetime.fromtimestamp((max(record.taken, 0) or record.modified) / 1e9)
    sides = {"width": record.width, "height": record.height}
    return {**shown, **sides, "bytes": record.size, "date": date}


@router.get("/details/{id}")
def details(service: Served, id: str) -> Details:
    """Says what is known of an image of the index."""
    return Details(**details_of(service, service.record(id), service.root()))


@router.get("/image/{id}", response_class=Response, responses=AN_IMAGE)
async def image(
    request: Request, service: Served, id: str, size: Literal["small", "medium", "large"] = "small"
) -> Response:
    """Shows an image of the index, or an upload, with at most 192, 384 or 1024 pixels a side."""
    if size == "small" and not id.startswith(PREFIX):
        content = (await asyncio.to_thread(service.record, id)).thumbnail
    else:
        content = await service.decoder.run(service.drawn, id, SIDES[size])
    return cacheable(request, content, "image/jpeg")


@router.get("/original/{id}", response_class=Response, responses=A_FILE)
async def original(request: Request, service: Served, id: str, save: bool = False) -> Response:
    """Sends the file of an image as it is, where paths are shown."""
    if not service.show_paths:
        raise HTTPException(403, "Files are sent on the server's own machine only.")
    record = await asyncio.to_thread(service.record, id)
    async with service.gate():
        data = await service.decoder.run(file_of, record)
    if data is None:
        raise HTTPException(404, "The file is gone, has changed, or lies in an archive.")
    kind = next((kind for start, kind in KINDS.items() if data.startswith(start)), None)
    headers = {}
    if save or kind is None:
        name = quote(Path(record.path).name, safe="")
        headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{name}"
    return cacheable(
        request, data, f"image/{kind}" if kind else "application/octet-stream", headers
    )


def cacheable(
    request: Request, content: bytes, kind: str, headers: dict[str, str] | None = None
) -> Response:
    """Answers with what the browser, and nobody between, may keep and ask about again."""
    etag = f'"{hash_of(content)}"'
    headers = {"ETag": etag, "Cache-Control": "private, max-age=300", **(headers or {})}
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, 200, headers, kind)
