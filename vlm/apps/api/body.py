"""The bytes of a request -> JSON values, within bounds of size, time, depth and number."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable
from typing import Any

from starlette.requests import Request

from vlm.apps.api.errors import ApiError
from vlm.apps.api.limits import Limits

# A string that never ends is matched to the end of the text: else each quote in it would be tried as the first one.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_QUOTES_PER_VALUE = 10  # those within texts count too
_BRACKET = re.compile(rb"[\[\]{}]")


async def read_json(request: Request, limits: Limits, hold: Callable[[int], None]) -> Any:
    """The body of a request.

    Args:
        hold: told of every part that comes in, in bytes; may raise.

    Raises:
        ApiError: 413 too large; 408 too slow; 415 no JSON by its header; 400 not JSON, too deep, too many values, NaN,
            or text that is not Unicode.
        ClientDisconnect: it left.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a web page may send other kinds across origins without asking first
        raise ApiError(415, "Content-Type must be application/json", "unsupported_media_type")
    try:
        async with asyncio.timeout(limits.body_seconds):
            body = await _read_bytes(request, limits.body_bytes, hold)
    except TimeoutError:
        raise ApiError(408, f"the request was not sent within {limits.body_seconds:g} seconds", "timeout") from None
    return await asyncio.to_thread(parse_json, body, limits)


def parse_json(body: bytes, limits: Limits) -> Any:
    """Strict JSON. Raises ApiError 400 as `read_json`.

    >>> parse_json(b'{"a": [1, "\\\\u597d"]}', Limits())
    {'a': [1, '好']}
    """
    _check_structure(body, limits)
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError:
        raise _bad("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise _bad(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except (ValueError, RecursionError):  # an integer of thousands of digits
        raise _bad("a number or value in it is too large") from None
    _refuse_half_characters(value)
    return value


async def _read_bytes(request: Request, limit: int, hold: Callable[[int], None]) -> bytes:
    """Counted while it comes in: Content-Length may be missing or a lie."""
    too_large = ApiError(413, f"the request is larger than {limit:,} bytes", "request_too_large")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
        hold(len(chunk))
    return bytes(body)


def _check_structure(body: bytes, limits: Limits) -> None:
    """Bounds on what the parser would build, found without building it: deep nesting ends Python's recursion, and an
    empty list takes 56 bytes of memory for 3 of text."""
    if body.count(b'"') > _QUOTES_PER_VALUE * limits.json_items:
        raise _bad(f"it holds more than {_QUOTES_PER_VALUE * limits.json_items:,} quotation marks")
    skeleton = _STRING.sub(b"", body)
    if sum(skeleton.count(mark) for mark in (b",", b"[", b"{")) > limits.json_items:
        raise _bad(f"it holds more than {limits.json_items:,} values")
    depth = 0
    for bracket in _BRACKET.finditer(skeleton):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > limits.json_depth:
            raise _bad(f"it is nested deeper than {limits.json_depth} levels")


def _refuse_half_characters(value: Any) -> None:
    """JSON can spell half of a surrogate pair; such text breaks later, where it is encoded."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise _bad("text in it holds half of a surrogate pair (a broken emoji escape)") from None


def _refuse_constant(name: str) -> Any:
    raise _bad(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _bad(f"the number {text[:20]} is too large")
    return number


def _bad(reason: str) -> ApiError:
    return ApiError(400, f"the request is no JSON that can be used: {reason}", "invalid_json")
