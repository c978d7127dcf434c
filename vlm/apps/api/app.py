"""The routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from vlm.apps.api.docs_page import CONTENT_SECURITY_POLICY, render_docs
from vlm.apps.api.errors import ApiError, internal_error
from vlm.apps.api.guard import Guard
from vlm.apps.api.limits import Access
from vlm.apps.api.metrics import CountRequests
from vlm.apps.api.openapi import add_schemas
from vlm.apps.api.routes import add_generation
from vlm.apps.api.schemas import ErrorBody, Health, ModelCard, ModelList
from vlm.apps.api.service import Service, unknown_model
from vlm.version import __version__

_ERRORS = {
    400: "The request cannot be used",
    401: "Missing or wrong API key",
    403: "Another Host than this machine",
    404: "Another model than the one that is served",
    408: "Sent too slowly",
    413: "Too large",
    415: "Not JSON",
    500: "The model failed",
    502: "An image could not be fetched",
    503: "Too many requests wait, or the server shuts down",
    504: "Took too long",
}
_NO_ADDRESS = (
    "there is nothing at this address; the base URL of the API ends in /v1, and it has /chat/completions, "
    "/completions, /responses and /models"
)


def build_app(service: Service, access: Access | None = None) -> FastAPI:
    """The API around one model. Its scheduler is started and stopped with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        await asyncio.to_thread(service.scheduler.stop)

    access = access or Access()
    # nothing but our own pages: FastAPI's documentation pages load scripts from elsewhere
    app = FastAPI(title="vlm", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    add_generation(app, service, responses(*_ERRORS))
    _add_models(app, service)
    _add_operations(app, service)
    _add_error_handlers(app)
    add_schemas(app, service, has_key=bool(access.api_keys))
    app.add_middleware(Guard, access=access)
    if access.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=access.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.add_middleware(CountRequests, metrics=service.metrics)
    return app


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Errors of a route, for the document."""
    return {status: {"model": ErrorBody, "description": _ERRORS[status]} for status in statuses}


def _add_models(app: FastAPI, service: Service) -> None:
    card = ModelCard(id=service.name, created=service.created)

    @app.get("/v1/models", responses=responses(401, 403), summary="The model that is served")
    async def list_models() -> ModelList:
        return ModelList(data=[card])

    @app.get("/v1/models/{model:path}", responses=responses(401, 403, 404), summary="One model")
    async def get_model(model: str) -> ModelCard:
        if model != service.name:
            raise unknown_model(service.name)
        return card


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=Health, responses={503: {"model": Health}}, summary="Whether chats are taken")
    async def health() -> JSONResponse:
        values = {
            "status": service.status,
            "model": service.name,
            "running": service.scheduler.num_running,
            "waiting": service.scheduler.num_waiting,
        }
        return JSONResponse(values, 200 if service.status == "ok" else 503)

    @app.get("/metrics", responses=responses(401, 403), summary="Counters for Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY}
        return HTMLResponse(render_docs(app.openapi(), service.name), headers=headers)

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("/docs")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        message = {404: _NO_ADDRESS, 405: "this address takes other methods"}
        answer = ApiError(error.status_code, message.get(error.status_code, "the request cannot be used"))
        response = answer.response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientDisconnect)
    async def client_left(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody reads it

    @app.exception_handler(Exception)
    async def unexpected(_: Request, __: Exception) -> Response:
        return internal_error().response()  # the server logs the exception itself
