"""The application: a page to search by images, and the JSON API that the page uses.

    app = create_app(Index.open("runs/index"))

`connections.server_of` runs it, with limits to what clients may hoard. Images are shown as JPEGs
that are made here; files are sent as they are only where paths are shown.
"""

import importlib.util
import mimetypes

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel

from cgd_jax.search import Index, StoreError
from cgd_jax.serve import browsing, describing, searching, showing
from cgd_jax.serve.guard import Guard
from cgd_jax.serve.service import Service


class Refusal(BaseModel):
    """Why a request was not answered."""

    detail: str


def create_app(index: Index, *, token: str | None = None, show_paths: bool = False) -> FastAPI:
    """Makes the application.

    Without a token it answers everybody who reaches it under a name of this machine, and trusts
    them with what `show_paths` grants others: where images lie, their files, and updates of the
    index.
    """
    app = FastAPI(
        title="Image search",
        description="Finds the images of an index that are most similar to a given one.",
        docs_url=None,  # its page loads scripts from elsewhere; ours is api.html
        redoc_url=None,
        responses={
            "4XX": {"model": Refusal, "description": "The request cannot be answered"},
            503: {"model": Refusal, "description": "Too many requests, or the index is away"},
        },
        exception_handlers={StoreError: _index_is_away},
    )
    app.state.service = Service(index, show_paths or token is None)
    app.add_middleware(Guard, token=token)
    for part in (searching, browsing, showing, describing):
        app.include_router(part.router)
    mimetypes.add_type("text/javascript", ".js")  # Windows may have been told otherwise
    if importlib.util.find_spec("fastapi_offline"):
        app.mount("/swagger", StaticFiles(packages=[("fastapi_offline", "static")]))
    app.mount("/", StaticFiles(packages=[("cgd_jax.serve", "static")], html=True))
    return app


async def _index_is_away(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": "The index cannot be read at the moment."}, 503)
