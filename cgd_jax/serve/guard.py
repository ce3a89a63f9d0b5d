"""Who may ask, and what browsers are told about every answer."""

import hmac
import re
from typing import Any
from urllib.parse import parse_qsl, quote, unquote_to_bytes, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "::1")
COOKIE = "cgd_jax_token"
# No script, style or image from elsewhere, none within the HTML, and no framing.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Guard:
    """Middleware that asks for a token, or else accepts requests to this machine by name only.

    Without a token, any page that a user of this machine visits could send requests under a name
    of its own that it has resolved to 127.0.0.1 (DNS rebinding): their Host header bears that name.
    """

    def __init__(self, app: ASGIApp, token: str | None = None):
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or hands it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await (self.refusal(scope) or self.app)(scope, receive, send_with_headers)

    def refusal(self, scope: Scope) -> Response | None:
        """Returns the answer to a request that goes no further, else None."""
        headers, path = Headers(scope=scope), scope["path"]
        if self.token is None and hostname(headers.get("host", "")) not in LOOPBACK:
            return PlainTextResponse("This server answers as localhost only.\n", 421)
        if path != "/" and is_foreign(headers):  # the page itself may be linked to
            return PlainTextResponse("Pages of other sites may not ask this server.\n", 403)
        if self.token is None or path == "/healthz":
            return None
        given = dict(parse_qsl(scope["query_string"].decode("latin-1"))).get("token", "")
        if path == "/" and self.is_token(given.encode()):
            # The token goes from the address, which is shown and shared, into a cookie.
            answer = RedirectResponse("/", 303)
            safe: dict[str, Any] = {"httponly": True, "secure": scope.get("scheme") == "https"}
            answer.set_cookie(COOKIE, quote(given, safe=""), samesite="lax", **safe)
            return answer
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        cookie = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        if kind.lower() == "bearer" and self.is_token(bearer.strip().encode("latin-1")):
            return None
        if self.is_token(unquote_to_bytes(cookie)):
            return None
        text = "A token is needed: open the address that the server printed when it started.\n"
        return PlainTextResponse(text, 401, {"WWW-Authenticate": "Bearer"})

    def is_token(self, given: bytes) -> bool:
        """Compares in a time that does not tell how much of it is right."""
        return hmac.compare_digest(given, (self.token or "").encode())


def is_foreign(headers: Headers) -> bool:
    """Returns whether a browser says that a page of another origin asks.

    Origin is compared where there is no Sec-Fetch-Site, which browsers send to https and to
    localhost; programs send neither.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        return site not in ("same-origin", "none")
    return origin is not None and urlsplit(origin).netloc != headers.get("host")


def hostname(host: str) -> str:
    """Returns the name in a Host header, without the port."""
    found = re.fullmatch(r"\[([0-9a-f:.]+)\](:\d+)?|([^:\[\]]+)(:\d+)?", host.lower())
    return (found[1] or found[3]) if found else ""
