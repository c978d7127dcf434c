"""The page at /docs: written from the OpenAPI document, complete in itself, nothing loaded from anywhere."""

from __future__ import annotations

import json
from html import escape
from typing import Any

CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
pre, code { font-family: ui-monospace, monospace; font-size: .9em; }
pre { overflow-x: auto; padding: .8rem; border: 1px solid #8886; border-radius: .4rem; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; vertical-align: top;
padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #8884; } summary { cursor: pointer; font-weight: 600; }
.method { font-weight: 700; margin-right: .5rem; }
"""

_EXAMPLE = """\
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")  # or the server's key
answer = client.chat.completions.create(
    model={name},
    messages=[{{"role": "user", "content": [
        {{"type": "image_url", "image_url": {{"url": "data:image/png;base64,..."}}}},
        {{"type": "text", "text": "What is this?"}},
    ]}}],
)
print(answer.choices[0].message.content)"""


def render_docs(document: dict[str, Any], model_name: str) -> str:
    """HTML with every route and schema of an OpenAPI document."""
    routes = "".join(
        _route(path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    )
    schemas = document["components"]["schemas"]
    tables = "".join(_schema(name, schemas[name]) for name in sorted(schemas, key=lambda name: name != "ChatRequest"))
    example = escape(_EXAMPLE.format(name=json.dumps(model_name)))
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport "
        f'content="width=device-width, initial-scale=1"><title>vlm: {escape(model_name)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>vlm: {escape(model_name)}</h1>"
        f"<p>Version {escape(document['info']['version'])}. Compatible with OpenAI's client. The same as a document: "
        f'<a href="/openapi.json">/openapi.json</a>.</p><pre>{example}</pre>'
        f"<h2>Routes</h2>{routes}<h2>Schemas</h2>{tables}</body></html>"
    )


def _route(path: str, method: str, operation: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(status)}<td>{escape(answer.get('description', ''))}<td>{_answer_kind(answer)}</tr>"
        for status, answer in operation.get("responses", {}).items()
    )
    body = ""
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        body = f"<p>Body: {escape(kind)}, {_kind(content['schema'])}</p>"
    return (
        f"<details open><summary><span class=method>{escape(method.upper())}</span><code>{escape(path)}</code> "
        f"{escape(operation.get('summary', ''))}</summary>{body}<table><tr><th>Status<th>Meaning<th>Body</tr>{rows}"
        "</table></details>"
    )


def _answer_kind(answer: dict[str, Any]) -> str:
    kinds = [_kind(content.get("schema", {})) for content in answer.get("content", {}).values()]
    return " or ".join(kind for kind in kinds if kind)


def _schema(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = "".join(
        f"<tr><td><code>{escape(field)}</code>{' *' if field in required else ''}</td><td>{_kind(value)}</td>"
        f"<td>{escape(value.get('description', ''))}</td></tr>"
        for field, value in schema.get("properties", {}).items()
    )
    opened = " open" if name == "ChatRequest" else ""
    return (
        f"<details{opened} id={escape(name)}><summary>{escape(name)}</summary>"
        f"<p>{escape(schema.get('description', ''))}</p>"
        f"<table><tr><th>Field (* needed)<th>Type<th>Meaning</tr>{rows}</table></details>"
    )


def _kind(schema: dict[str, Any]) -> str:
    """A type in a few words, with links to named ones."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        return " or ".join(_kind(choice) for choice in choices)
    if "const" in schema or "enum" in schema:
        return escape(" | ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {})) or 'values'}"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "maxItems": "at most"}
    told = [f"{words} {schema[key]}" for key, words in bounds.items() if key in schema]
    return escape(" ".join([str(schema.get("type", "")), *told]).strip())
