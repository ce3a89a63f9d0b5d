"""What --mode=serve does."""

import contextlib
import os
import secrets
import socket
from urllib.parse import quote

import numpy as np

from cgd_jax.runtime import console, packages
from cgd_jax.runtime.errors import InputError
from cgd_jax.search import Index

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

    A host other than loopback needs a token. InputError: the address is in use, or not of this
    machine; the index is of another network; or the token is short.
    """
    packages.require("--mode=serve", "serve", "fastapi", "uvicorn")
    from cgd_jax.serve.app import create_app
    from cgd_jax.serve.connections import server_of
    from cgd_jax.serve.guard import LOOPBACK

    token = os.environ.get(TOKEN) or None
    if token is None and host not in LOOPBACK:
        token = secrets.token_urlsafe(32)
    if token is not None and len(token) < SHORTEST:
        raise InputError(f"{TOKEN} is shorter than {SHORTEST} characters; take a longer one.")
    with listen(host, port) as listener:
        index = Index.open(address, model)
        application = create_app(index, token=token, show_paths=show_paths)
        warm_up(index)
        application.state.service.collection()
        server = server_of(application)
        rest = f":{listener.getsockname()[1]}/"
        if token is not None:
            rest += f"?token={quote(token, safe='')}"
        urls = " or ".join(f"http://{name}{rest}" for name in names_of(host))
        console.log(f"{index.count():,} images: {urls}")
        server.run(sockets=[listener])


def names_of(host: str) -> list[str]:
    """Returns the addresses under which a server that listens at a host is reached."""
    if host not in ("0.0.0.0", "::"):
        return [f"[{host}]" if ":" in host else host]
    names = ["127.0.0.1"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # sends nothing, but says by which address it would
        names.append(probe.getsockname()[0])
    return names


def listen(host: str, port: int) -> socket.socket:
    """Opens the address to listen at, before anything that takes long; InputError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((host, port), family=family, dualstack_ipv6=dual)
    except (OSError, TypeError, ValueError) as error:  # for what no name can be
        reason = getattr(error, "strerror", "no machine is called that")
        raise InputError(
            f"--host={host} --port={port} cannot be listened at: {reason}. Give another with "
            f"--port= or --host=; --port=0 takes a free port."
        ) from error


def warm_up(index: Index) -> None:
    """Compiles what queries need, so that none waits for it."""
    size = index.network.size
    for shape in [(size, size)] if isinstance(size, int) else size:
        index.embed_pixels([np.zeros((*shape, 3), np.uint8)])
