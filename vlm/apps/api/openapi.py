"""The OpenAPI document, with the bodies of requests in it: the routes read bodies themselves, within bounds."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from vlm.apps.api.response_schemas import ResponseRequest
from vlm.apps.api.routes import CHAT, RESPONSES, TEXT
from vlm.apps.api.schemas import ChatRequest, Chunk
from vlm.apps.api.service import Service
from vlm.apps.api.text_schemas import TextRequest

_BODIES: dict[str, type[BaseModel]] = {CHAT: ChatRequest, TEXT: TextRequest, RESPONSES: ResponseRequest}
_EVENTS = {
    CHAT: "the data of each is a Chunk; then [DONE]",
    TEXT: "the data of each is a TextCompletion; then [DONE]",
    RESPONSES: "response.created to response.completed, as OpenAI's; the last holds the whole Response",
}
_REFERENCE = "#/components/schemas/{model}"


def add_schemas(app: FastAPI, service: Service, has_key: bool) -> None:
    """Let `app.openapi()` tell what this server takes, its own limits included."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, service, has_key)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI, service: Service, has_key: bool) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = document["components"]["schemas"]
    models: tuple[type[BaseModel], ...] = (*_BODIES.values(), Chunk)
    for model in models:
        schema = model.model_json_schema(ref_template=_REFERENCE)
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    for path, model in _BODIES.items():
        _add_limits(schemas[model.__name__]["properties"], service)
        route = document["paths"][path]["post"]
        body = {"schema": {"$ref": _REFERENCE.format(model=model.__name__)}}
        route["requestBody"] = {"required": True, "content": {"application/json": body}}
        answers = route["responses"]["200"]["content"]
        answers["text/event-stream"] = {"schema": {"description": f"Events: {_EVENTS[path]}"}}
    if has_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in document["paths"].items():
            for operation in methods.values() if path != "/health" else ():
                operation["security"] = [{"key": []}]
    return document


def _add_limits(properties: dict[str, Any], service: Service) -> None:
    limits = service.limits
    longest = min(service.scheduler.max_tokens, service.loaded.max_tokens)
    properties["model"]["enum"] = [service.name]
    if "messages" in properties:
        properties["messages"]["maxItems"] = limits.max_messages
    most = dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), longest)
    for name, value in {**most, "n": limits.max_choices}.items():
        if name in properties:
            properties[name]["anyOf"][0]["maximum"] = value
    for choice in properties.get("stop", {}).get("anyOf", ()):
        if choice.get("type") == "array":
            choice["maxItems"] = limits.max_stops
