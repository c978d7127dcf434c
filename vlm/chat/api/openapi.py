"""The OpenAPI document, with the body of a chat request in it: the routes read bodies themselves, within bounds."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from vlm.chat.api.schemas import ChatRequest, Chunk
from vlm.chat.api.service import Service

CHAT = "/v1/chat/completions"
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
    for model in (ChatRequest, Chunk):
        schema = model.model_json_schema(ref_template=_REFERENCE)
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    _add_limits(schemas["ChatRequest"]["properties"], service)
    chat = document["paths"][CHAT]["post"]
    body = {"schema": {"$ref": _REFERENCE.format(model="ChatRequest")}}
    chat["requestBody"] = {"required": True, "content": {"application/json": body}}
    answers = chat["responses"]["200"]["content"]
    answers["text/event-stream"] = {"schema": {"description": "Events: the data of each is a Chunk; then [DONE]"}}
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
    properties["messages"]["maxItems"] = limits.max_messages
    for name, most in (("max_tokens", longest), ("max_completion_tokens", longest), ("n", limits.max_choices)):
        properties[name]["anyOf"][0]["maximum"] = most
    for choice in properties["stop"]["anyOf"]:
        if choice.get("type") == "array":
            choice["maxItems"] = limits.max_stops
