"""One tiny export for all tests of the API."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_server import SMALL, Running, make_service, on_port, without_port
from tiny_export import model_config, write_image, write_llm, write_run

from vlm.apps.api.limits import Access, Limits
from vlm.export.run import export_run
from vlm.inference.load import LoadedModel, load


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("api")
    write_llm(root / "llm", max_positions=1024)
    write_run(root / "run", model_config(root))
    for number in range(6):
        write_image(root / f"{number}.png", seed=number)
    return export_run(root / "run")


@pytest.fixture(scope="session")
def loaded(export: Path) -> LoadedModel:
    return load(export, device="cpu", precision="fp32")


@pytest.fixture(scope="session")
def image(export: Path) -> Callable[[int], str]:
    """The data: URL of one of six images."""

    def url(number: int) -> str:
        data = (export.parents[1] / f"{number}.png").read_bytes()
        return f"data:image/png;base64,{base64.b64encode(data).decode()}"

    return url


@pytest.fixture
def call(loaded: LoadedModel) -> Callable[..., httpx.Response]:
    """One request to a fresh server without a port."""

    def run(
        method: str,
        path: str,
        *,
        limits: Limits = SMALL,
        media: Any = None,
        access: Access | None = None,
        **request: Any,
    ) -> httpx.Response:
        async def inside() -> httpx.Response:
            async with without_port(make_service(loaded, limits, media), access) as client:
                return await client.request(method, path, **request)

        return asyncio.run(inside())

    return run


@pytest.fixture(scope="session")
def server(loaded: LoadedModel) -> Iterator[Running]:
    """Shared by tests that change nothing about it."""
    with on_port(make_service(loaded)) as running:
        yield running
