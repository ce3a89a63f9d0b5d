"""Connections that nobody can hoard: uvicorn itself waits for ever for the head of a request."""

import asyncio
import time
from typing import Any, cast

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

SLOWEST = 10  # seconds for the head of a request, and without reading anything; twice at most
MOST = 256  # connections at a time
MOST_OF_ADDRESS = 64  # of one address


def server_of(application: ASGIApp) -> Server:
    """Returns the server of an application; `run(sockets=...)` runs it."""
    # Errors go to stderr; requests, which may hold tokens, nowhere.
    silence: dict[str, Any] = {"log_level": "error", "log_config": None, "access_log": False}
    options: dict[str, Any] = {"ws": "none", "lifespan": "off", "server_header": False, **silence}
    return Server(Config(application, http=Connection, timeout_graceful_shutdown=5, **options))


class Connection(H11Protocol):
    """A connection that ends when its client is too slow, and whose request ends with it.

    Where there are too many, a new connection takes the place of the one whose client has not sent
    a whole request for the longest: silent and slow ones keep nobody out.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.idle_since = time.perf_counter()
        self._task: asyncio.Task | None = None
        self._application, self.app = self.app, self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._task = asyncio.current_task()
        try:
            await self._application(scope, receive, send)
        except asyncio.CancelledError:
            if not self.transport.is_closing():
                raise

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Makes room."""
        super().connection_made(transport)
        self.address = self.client and self.client[0]  # None if the client has left already
        everybody = cast(set[Connection], self.connections)
        mine = [one for one in everybody if one.address == self.address]
        for others, most in ((mine, MOST_OF_ADDRESS), (everybody, MOST)):
            if len(others) > most:
                oldest = min(filter(Connection.waiting, others), key=lambda one: one.idle_since)
                everybody.discard(oldest)
                oldest.transport.abort()
        self._look()

    def idle(self) -> bool:
        """Returns whether there is no request that has not been answered."""
        return self.cycle is None or self.cycle.response_complete

    def waiting(self) -> bool:
        """Returns whether it is the client's turn: there is no request, or not all of its body."""
        return self.idle() or self.cycle.more_body

    def _look(self, before: tuple[float, int] | None = None) -> None:
        """Looks every few seconds whether a request has begun, and what is sent is being read."""
        state = self.idle_since, self.transport.get_write_buffer_size()
        if state == before and (self.idle() or state[1]):
            self.transport.abort()
        elif self in self.connections:
            self.loop.call_later(SLOWEST, self._look, state)

    def on_response_complete(self) -> None:
        """Waits for the next request."""
        self.idle_since = time.perf_counter()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancels the work for a client that has left."""
        super().connection_lost(exc)
        if self._task is not None:
            self._task.cancel()
