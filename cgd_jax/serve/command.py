"""What --mode=serve does."""

import os
import socket

import numpy as np

from cgd_jax import network
from cgd_jax.runtime import console, packages
from cgd_jax.runtime.errors import InputError
from cgd_jax.search import Index

__all__ = ["serve"]

TOKEN = "CGD_JAX_TOKEN"  # the environment variable; command lines are seen by everybody
SHORTEST = 16  # characters of a token


def serve(
    address: str,
    model: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    show_paths: bool = False,
) -> None:
    """Serves the page and the API until it is interrupted.

    Args:
      address: of the index.
      model: as `Index.open` takes it.
      host: address of this machine to listen at; other than loopback, a token is needed.
      port: to listen at; 0 takes a free one.
      show_paths: whether answers tell where pictures lie.

    Raises:
      FileNotFoundError: there is no index, or no such network.
      ImportError: a package is missing.
      OSError: the address is in use, or not of this machine.
      InputError: the index is of another network, or the token is short.
    """
    packages.require("--mode=serve", "serve", "fastapi", "uvicorn")
    import uvicorn

    from cgd_jax.serve import app, guard

    token = os.environ.get(TOKEN) or None
    if token is None and host not in guard.LOOPBACK:
        token = guard.new_token()
    if token is not None and len(token) < SHORTEST:
        raise InputError(f"{TOKEN} is shorter than {SHORTEST} characters; take a longer one.")
    with listen(host, port) as listener:
        index = Index.open(address, model)
        warm_up(index)
        application = app.create_app(index, token=token, show_paths=show_paths)
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listener.getsockname()[1]}/"
        console.log(f"{index.count():,} pictures: {url}{f'?token={token}' if token else ''}")
        config = uvicorn.Config(
            application,
            log_level="error",
            log_config=None,  # errors go to stderr; requests, which may hold tokens, nowhere
            access_log=False,
            server_header=False,
            limit_concurrency=256,
            timeout_graceful_shutdown=5,
        )
        uvicorn.Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Opens the address to listen at, before anything that takes long."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(where)
            listener.listen()  # who comes before the server is there waits, and is not refused
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"--host={host} --port={port} cannot be listened at: {reason}. Give another with "
            f"--port= or --host=; --port=0 takes a free port."
        ) from error
    return listener


def warm_up(index: Index) -> None:
    """Compiles what queries need, so that none waits for it."""
    side = index.info.resize
    for size in network.batch_sizes():
        index.embed_pixels(np.zeros((size, side, side, 3), np.uint8))
