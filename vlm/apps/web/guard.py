"""What stands between the network and gradio: which requests pass, whose they are, what answers may load."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any

import anyio
from starlette.requests import ClientDisconnect

from vlm.apps.address import host_name, is_loopback
from vlm.apps.web.texts import tell_both
from vlm.apps.web.uploads import MEGABYTE, UploadRefused, Uploads
from vlm.logs import warn

COOKIE = "vlm_owner"
_TOKEN = re.compile(r"[A-Za-z0-9_-]{32}")
_API = "/gradio_api"
_FILE = f"{_API}/file="
_UPLOAD = f"{_API}/upload"
# What the page needs. Gradio has more: it fetches URLs, records, shares links, keeps a history of runs.
_PATHS = {
    "/", "/config", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json", "/login", "/logout", "/login_check",
    "/pwa_icon", *(f"{_API}/{name}" for name in (
        "queue/join", "queue/data", "upload", "upload_progress", "startup-events", "theme.css", "info", "cancel",
        "reset", "app_id", "user", "login_check", "token",
    )),
}  # fmt: skip
_FOLDERS = ("/assets/", "/static/", "/svelte/", f"{_API}/run/", f"{_API}/heartbeat/", _FILE)
_READING = ("GET", "HEAD", "OPTIONS")
_STALL_SECONDS = 60.0  # without a byte of an upload that has begun; its files would stay as long as its connection
_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # gradio's page cannot do without
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",  # an image that a reply names elsewhere is not fetched
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
_FILE_POLICY = "default-src 'none'; sandbox"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """ASGI middleware. Every browser gets a random cookie, which owns what it uploads.

    Args:
        local_only: refuse requests under any other name than the loopback ones, as a page elsewhere makes them by
            pointing its own name here.
        max_file_size: bytes of one file.
        max_body: bytes of one request.
        head: put into the page before anything of gradio's runs.
    """

    def __init__(
        self, app: App, uploads: Uploads, local_only: bool, max_file_size: int, max_body: int, head: str = ""
    ) -> None:
        self.app = app
        self.uploads = uploads
        self.local_only = local_only
        self.max_file_size = max_file_size
        self.max_body = max_body
        self.head = head
        self._decoders = anyio.CapacityLimiter(2)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refuse(scope, headers)
        if refused is not None:
            await _answer(send, *refused)
            return
        owner = owner_of(headers.get(b"cookie"))
        is_new = owner is None
        if owner is None:
            owner = secrets.token_urlsafe(24)
            scope["headers"] = _with_cookie(scope["headers"], owner)
        path = scope["path"]
        if path.startswith(_FILE) and not self.uploads.owns(owner, path.removeprefix(_FILE)):
            await _answer(send, 403, "not an image of this conversation")
            return
        policy = _FILE_POLICY if path.startswith(_FILE) else _POLICY
        send = _with_headers(send, policy, owner if is_new else None)
        if path.rstrip("/") == _UPLOAD:
            await self._upload(scope, receive, send, owner)
        elif path == "/" and scope["method"] == "GET":
            await self._page(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refuse(self, scope: Scope, headers: dict[bytes, str]) -> tuple[int, str] | None:
        if self.local_only and not is_loopback(host_name(headers.get(b"host", ""))):
            return 403, "this server answers under its loopback names only"
        if scope["method"] not in _READING and is_foreign(headers):
            return 403, "the page of another site sent this"
        path = scope["path"]
        if path != "/" and path.rstrip("/") not in _PATHS and not path.startswith(_FOLDERS):
            return 404, "not found"
        if scope["method"] == "POST":
            length = headers.get(b"content-length", "")
            if not length.isdigit():
                return 411, "the length of the request is missing"
            if int(length) > self.max_body:
                return 413, tell_both("file_too_large", limit=self.max_file_size // MEGABYTE)
        return None

    async def _page(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: MutableMapping[str, Any] = {}
        body = b""

        async def keep(message: MutableMapping[str, Any]) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
            elif message["type"] == "http.response.body":
                body += message.get("body", b"")

        await self.app(scope, receive, keep)
        body = body.replace(b"<head>", b"<head>" + self.head.encode(), 1)
        headers = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
        await send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await send({"type": "http.response.body", "body": body})

    async def _upload(self, scope: Scope, receive: Receive, send: Send, owner: str) -> None:
        """Let gradio write the files, then look at them before anyone learns their names."""
        messages: list[MutableMapping[str, Any]] = []

        async def keep(message: MutableMapping[str, Any]) -> None:
            messages.append(message)

        try:
            with self.uploads.receive() as count:
                await self.app(scope, _counted(receive, count), keep)
                await self._accept(messages, owner)
        except UploadRefused as error:
            warn(f"webui: upload refused: {error}")
            messages = []
            await _answer(send, error.status, str(error))
        except ClientDisconnect:
            messages = []  # nobody is there to be answered
        for message in messages:
            await send(message)

    async def _accept(self, messages: list[MutableMapping[str, Any]], owner: str) -> None:
        """Raises UploadRefused: gradio refused the upload, or it holds more than images."""
        status = next((message["status"] for message in messages if message["type"] == "http.response.start"), 500)
        if status == 413:
            raise UploadRefused(413, tell_both("file_too_large", limit=self.max_file_size // MEGABYTE))
        if status == 401:
            raise UploadRefused(401, "log in first")
        if status != 200:
            raise UploadRefused(400, tell_both("upload_failed"))
        paths = [str(path) for path in json.loads(b"".join(message.get("body", b"") for message in messages))]
        await anyio.to_thread.run_sync(self.uploads.accept, owner, paths, limiter=self._decoders)


def is_foreign(headers: Mapping[bytes, str]) -> bool:
    """Whether the page of another site made a browser send a request. A program sends neither header.

    Where the browser itself says so, that counts: a proxy may have replaced the Host header by its own. Browsers say it
    to HTTPS and to localhost. The scheme is not compared, as it differs behind a proxy with TLS.

    >>> is_foreign({b"host": "box:7860", b"origin": "http://box:7860"})
    False
    >>> is_foreign({b"host": "box:7860", b"origin": "null"}), is_foreign({b"sec-fetch-site": "cross-site"})
    (True, True)
    """
    site = headers.get(b"sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")  # none: the user, not a page
    origin = headers.get(b"origin")
    return origin is not None and origin.partition("://")[2].lower() != (headers.get(b"host") or "?").lower()


def cookie_of(cookies: str | None, name: str) -> str | None:
    """One value of a Cookie header."""
    try:
        morsel = SimpleCookie(cookies or "").get(name)
    except CookieError:
        return None
    return None if morsel is None else morsel.value


def owner_of(cookies: str | None) -> str | None:
    """The owner named by a Cookie header; None without one, or when it is not of our form."""
    value = cookie_of(cookies, COOKIE)
    return value if value is not None and _TOKEN.fullmatch(value) else None


def _with_cookie(headers: list[tuple[bytes, bytes]], owner: str) -> list[tuple[bytes, bytes]]:
    """So that what handles this very request knows the owner too."""
    given = [value for name, value in headers if name.lower() == b"cookie"]
    others = [(name, value) for name, value in headers if name.lower() != b"cookie"]
    return [*others, (b"cookie", b"; ".join([*given, f"{COOKIE}={owner}".encode()]))]


def _with_headers(send: Send, policy: str, new_owner: str | None) -> Send:
    async def send_with(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            added = [
                (b"content-security-policy", policy.encode()),
                (b"x-content-type-options", b"nosniff"),
                (b"referrer-policy", b"no-referrer"),
            ]
            if new_owner is not None:
                cookie = f"{COOKIE}={new_owner}; Path=/; HttpOnly; SameSite=Lax"
                added.append((b"set-cookie", cookie.encode()))
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return send_with


def _counted(receive: Receive, count: Callable[[int], None]) -> Receive:
    """Tells `count` the size of each piece. Raises UploadRefused when none comes for long, or as `count` does."""

    async def receive_counted() -> MutableMapping[str, Any]:
        try:
            with anyio.fail_after(_STALL_SECONDS):
                message = await receive()
        except TimeoutError:
            raise UploadRefused(408, tell_both("upload_failed")) from None
        count(len(message.get("body", b"")))
        return message

    return receive_counted


async def _answer(send: Send, status: int, text: str) -> None:
    body = text.encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"x-content-type-options", b"nosniff"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
