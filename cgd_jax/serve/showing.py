"""Images, and what is known of them."""

from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, HTTPException, Request, Response
from starlette.concurrency import run_in_threadpool

from cgd_jax.search.images import file_of, hash_of
from cgd_jax.serve.service import Served, Shown
from cgd_jax.serve.uploads import PREFIX

SIDES = {"small": 192, "medium": 384, "large": 1024}  # pixels, the longer side of what is shown
# What browsers show; anything else they are told to save, and not to guess what it is.
KINDS = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png", b"GIF8": "gif", b"RIFF": "webp"}
SENT: dict[int | str, dict[str, Any]] = {200: {"content": {"image/*": {}}}}
router = APIRouter(tags=["images"])


@router.get("/details/{id}")
def details(service: Served, id: str) -> Shown:
    """Says what is known of an image of the index."""
    return service.shown(service.record(id), service.collection().root)


@router.get("/image/{id}", response_class=Response, responses=SENT)
async def image(
    request: Request, service: Served, id: str, size: Literal["small", "medium", "large"] = "small"
) -> Response:
    """Shows an image of the index, or an upload, as a JPEG of at most 192, 384 or 1024 pixels."""
    if size == "small" and not id.startswith(PREFIX):
        content = (await run_in_threadpool(service.record, id)).thumbnail
    else:
        content = await service.work(service.drawn, id, SIDES[size])
    return cacheable(request, content, "image/jpeg")


@router.get("/original/{id}", response_class=Response, responses=SENT)
def original(request: Request, service: Served, id: str) -> Response:
    """Sends the file of an image as it is, where paths are shown."""
    if not service.show_paths:
        raise HTTPException(403, "Files are sent on the server's own machine only.")
    record = service.record(id)
    data = file_of(record)
    if data is None:
        raise HTTPException(404, "The file is gone, has changed, or lies in an archive.")
    kind = next((kind for start, kind in KINDS.items() if data.startswith(start)), None)
    name = quote(Path(record.path).name, safe="")
    how = f"{'inline' if kind else 'attachment'}; filename*=UTF-8''{name}"
    kind = f"image/{kind}" if kind else "application/octet-stream"
    return cacheable(request, data, kind, **{"Content-Disposition": how})


def cacheable(request: Request, content: bytes, kind: str, **more: str) -> Response:
    """Answers with what the browser, and nobody between, may keep and ask about again."""
    etag = f'"{hash_of(content)}"'
    headers = {"ETag": etag, "Cache-Control": "private, max-age=300", **more}
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, 200, headers, kind)
