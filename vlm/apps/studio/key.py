"""Who may use the studio: the browser that was opened with the key in the printed address.

It listens on 127.0.0.1 only, but every user of the machine can connect to that, and the page starts programs.
"""

from __future__ import annotations

import secrets
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import parse_qs

from vlm.apps.web.guard import App, Receive, Scope, Send, cookie_of

COOKIE = "vlm_studio"
_OWN = "/gradio_api/startup-events"  # gradio asks its own server for it, without a cookie; it tells nothing
_REFUSED = """Open the address that `vlm studio` printed, with its key.
请打开 vlm studio 打印的地址（含密钥）。
"""


class KeyGuard:
    """ASGI middleware: `/?key=KEY` sets a cookie and leads to `/`; without that cookie, all is answered with 401."""

    def __init__(self, app: App, key: str) -> None:
        self.app = app
        self.key = key
        self.session = secrets.token_urlsafe(24)  # in the cookie: who reads that cannot open the address anew

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = parse_qs(scope["query_string"].decode("latin-1")).get("key", [""])[0]
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["path"] == _OWN or _is(cookie_of(headers.get(b"cookie"), self.cookie_name(headers)), self.session):
            await self.app(scope, receive, send)
        elif scope["path"] == "/" and _is(asked, self.key):
            cookie = f"{self.cookie_name(headers)}={self.session}; Path=/; HttpOnly; SameSite=Lax"
            await _answer(send, 303, [(b"location", b"/"), (b"set-cookie", cookie.encode())])
        else:
            await _answer(send, 401, [], _REFUSED.encode())

    @staticmethod
    def cookie_name(headers: MutableMapping[bytes, str]) -> str:
        """One for each port, as a browser sends the cookies of a host to all its ports."""
        port = headers.get(b"host", "").rpartition(":")[2]
        return f"{COOKIE}_{port if port.isdecimal() else 80}"


def _is(value: str | None, secret: str) -> bool:
    return value is not None and secrets.compare_digest(value.encode(), secret.encode())


async def _answer(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes = b"") -> None:
    shared: list[Any] = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*shared, *headers]})
    await send({"type": "http.response.body", "body": body})
