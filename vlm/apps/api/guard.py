"""Who may come in: the key, and without keys only programs on this machine that mean this server."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlm.apps.address import host_name, is_loopback
from vlm.apps.api.errors import ApiError
from vlm.apps.api.limits import Access
from vlm.errors import ConfigError

OPEN_PATHS = ("/", "/health", "/docs", "/openapi.json")  # say nothing that the documentation does not


def check_access(host: str, access: Access) -> None:
    """
    Raises:
        ConfigError: others could connect and there is no key; a key that no client can send; any origin without a key.
    """
    if not is_loopback(host) and not access.api_keys:
        raise ConfigError(
            f"--host {host} lets other machines connect, so an API key is needed: set --api-key or VLM_API_KEY, "
            "e.g. to the output of `openssl rand -hex 32`. Or keep the default host 127.0.0.1"
        )
    if any(len(key) < 8 or not all("!" <= letter <= "~" for letter in key) for key in access.api_keys):
        raise ConfigError("--api-key: expected at least 8 printable ASCII characters without spaces")
    if "*" in access.origins and not access.api_keys:
        raise ConfigError("--allow-origin '*' without --api-key lets every web page use the model; name the origins")


class Guard:
    """Middleware: answers 401 without the right key; without keys, 403 to requests that name another host.

    A web page whose own name is made to point at 127.0.0.1 (DNS rebinding) is told apart by that Host header.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._keys = [key.encode() for key in access.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        error = self._refusal(scope["path"], Headers(scope=scope))
        if error is not None:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, _with_headers(send))

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if not self._keys:
            if is_loopback(host_name(headers.get("host", ""))):
                return None
            return ApiError(403, "this server answers to localhost only; start it with --api-key", "host_not_allowed")
        if path in OPEN_PATHS or self._is_known(headers.get("authorization", "")):
            return None
        return ApiError(401, "missing or wrong API key; send Authorization: Bearer KEY", "invalid_api_key")

    def _is_known(self, authorization: str) -> bool:
        scheme, _, given = authorization.partition(" ")
        value = given.strip().encode("utf-8", "surrogateescape")
        # all keys are compared, each in a time that does not depend on where it differs
        matches = [hmac.compare_digest(value, key) for key in self._keys]
        return scheme.lower() == "bearer" and any(matches)


def _with_headers(send: Send) -> Send:
    async def extended(message: Message) -> None:
        if message["type"] == "http.response.start":
            extra = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]
            message = {**message, "headers": [*message.get("headers", ()), *extra]}
        await send(message)

    return extended
