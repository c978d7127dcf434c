"""A tiny model behind the API: in this process without a port, or on a port of loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from openai import OpenAI

from vlm.apps.api.app import build_app
from vlm.apps.api.connections import Connection
from vlm.apps.api.limits import Access, Limits, Media
from vlm.apps.api.media import MediaLoader
from vlm.apps.api.server import build_service
from vlm.apps.api.service import Service
from vlm.inference.load import LoadedModel

NAME = "tiny"
SMALL = Limits(max_tokens=4096, default_new_tokens=8)


@dataclass
class Running:
    """A server on a port of loopback."""

    url: str
    service: Service

    def openai(self, **settings: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", **{"max_retries": 0, "timeout": 60.0} | settings)

    def wait_until(self, condition: Callable[[Service], bool], seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not condition(self.service):
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.01)


def make_service(loaded: LoadedModel, limits: Limits = SMALL, media: Any = None) -> Service:
    loader = media if isinstance(media, MediaLoader) else MediaLoader(media or Media())
    return build_service(loaded, NAME, loader, limits)


@contextmanager
def on_port(service: Service, access: Access | None = None) -> Iterator[Running]:
    config = uvicorn.Config(build_app(service, access), host="127.0.0.1", port=0, http=Connection, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", service)
    finally:
        server.should_exit = True
        thread.join(20)


@asynccontextmanager
async def without_port(service: Service, access: Access | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A client whose requests go straight into the app."""
    app = build_app(service, access)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client,
    ):
        yield client


def user(text: str, *urls: str) -> list[dict[str, Any]]:
    """Messages of one question, with images before it."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def ask(**changes: Any) -> dict[str, Any]:
    """Body of a chat request."""
    return {"model": NAME, "messages": user("What is this?"), "temperature": 0, "max_tokens": 4} | changes
