"""Bodies that are too large, too deep, too many or not JSON, and values out of range: 400s in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from api_server import SMALL, ask, make_service, user, without_port

from vlm.apps.api.body import parse_json
from vlm.apps.api.errors import ApiError
from vlm.apps.api.limits import MIB, Limits
from vlm.inference.load import LoadedModel

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
Call = Callable[..., httpx.Response]


def refused(response: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    """Checks that an answer is an error as OpenAI words them."""
    assert response.status_code == status, response.text[:500]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert code is None or error["code"] == code
    return error


def body_of(text: str) -> bytes:
    return json.dumps(ask(messages=user(text))).encode()


def test_a_body_over_the_limit_gets_413_and_one_below_it_an_answer(call: Call):
    limits = replace(SMALL, body_bytes=10_000)
    refused(call("POST", CHAT, limits=limits, content=body_of("x" * 10_000), headers=JSON), 413, "request_too_large")
    assert call("POST", CHAT, limits=limits, content=body_of("x" * 500), headers=JSON).status_code == 200


def test_a_body_is_counted_while_it_comes_in_and_no_further(loaded: LoadedModel):
    """50 MB without a Content-Length, then 50 MB with one that says 10."""
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        for _ in range(50):
            taken += 1
            yield b" " * MIB

    async def post(headers: dict[str, str]) -> httpx.Response:
        async with without_port(make_service(loaded, replace(SMALL, body_bytes=4 * MIB))) as client:
            return await client.post(CHAT, content=endless(), headers=JSON | headers)

    for headers in ({}, {"content-length": "10"}):
        taken = 0
        refused(asyncio.run(post(headers)), 413, "request_too_large")
        assert taken == 5  # four fit, the fifth is one too many


def test_an_announced_size_is_refused_before_anything_is_read(loaded: LoadedModel):
    async def unread() -> AsyncIterator[bytes]:
        raise AssertionError("read")
        yield b""

    async def post() -> httpx.Response:
        async with without_port(make_service(loaded)) as client:
            return await client.post(CHAT, content=unread(), headers=JSON | {"content-length": "999999999999"})

    refused(asyncio.run(post()), 413)


def test_a_slow_body_is_given_up(loaded: LoadedModel):
    async def drip() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.05)

    async def post() -> httpx.Response:
        async with without_port(make_service(loaded, replace(SMALL, body_seconds=0.3))) as client:
            return await client.post(CHAT, content=drip(), headers=JSON)

    refused(asyncio.run(post()), 408, "timeout")


def test_all_bodies_together_are_bounded(loaded: LoadedModel):
    """Of two requests of 3 MiB each that come at once, 4 MiB allowed, one is sent away."""
    service = make_service(loaded, replace(SMALL, all_bodies_bytes=4 * MIB))

    hurdle = asyncio.Event()

    async def half() -> AsyncIterator[bytes]:
        yield b" " * (3 * MIB)
        await hurdle.wait()
        yield json.dumps(ask()).encode()

    async def post() -> list[httpx.Response]:
        async with without_port(service) as client:
            first = asyncio.create_task(client.post(CHAT, content=half(), headers=JSON))
            while not service.num_held:
                await asyncio.sleep(0.01)
            second = await client.post(CHAT, content=b" " * (3 * MIB), headers=JSON)
            hurdle.set()
            return [await first, second]

    first, second = asyncio.run(post())
    assert first.status_code == 200
    refused(second, 503, "overloaded")
    assert service.num_held == service.num_open == 0


BAD_JSON = {
    "nested 100,000 deep": b"[" * 100_000,
    "nested deep below an object": b'{"messages":' * 200 + b"1" + b"}" * 200,
    "nested by both kinds": b'[{"a":' * 50_000,
    "a million empty lists": b"[" + b"[]," * 1_000_000 + b"[]]",
    "lone surrogate": b'{"model": "\\ud83d"}',
    "lone surrogate as a key": b'{"\\udc00": 1}',
    "NaN": b'{"temperature": NaN}',
    "Infinity": b'{"temperature": -Infinity}',
    "1e999": b'{"temperature": 1e999}',
    "5000 digits": b'{"max_tokens": ' + b"9" * 5000 + b"}",
    "not UTF-8": b'{"model": "\xff"}',
    "UTF-16": '{"model": "a"}'.encode("utf-16"),
    "BOM": b"\xef\xbb\xbf{}",
    "cut off": b'{"model": "a',
    "trailing text": b"{} {}",
    "empty": b"",
    "half an escape": b'"\\',
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_json_that_cannot_be_used_gets_400(call: Call, name: str):
    error = refused(call("POST", CHAT, content=BAD_JSON[name], headers=JSON), 400, "invalid_json")
    assert len(error["message"]) < 200


def test_good_json_of_the_same_kinds_is_read():
    deep = b"[" * 60 + b"]" * 60
    assert parse_json(deep, Limits()) is not None
    value = parse_json(b'{"a": "\\ud83d\\ude00 [[[[{{{{", "b": [1, 2.5, null, true], "c": "\\\\\\""}', Limits())
    assert value == {"a": "😀 [[[[{{{{", "b": [1, 2.5, None, True], "c": '\\"'}


BODIES = {
    "one string without end": b'"' + b'\\"' * 490_000 + b"a" * 7_000_000,
    "quotes and backslashes": b'"\\' * 4_000_000,
    "empty strings": b'"' * 8_000_001,
    "brackets": b"[" * 8_000_000,
}


@pytest.mark.parametrize("name", BODIES)
def test_no_text_takes_long_to_refuse(name: str):
    """8 MB each. A pattern that starts anew at every quote takes minutes on the first."""
    started = time.process_time()
    with pytest.raises(ApiError):
        parse_json(BODIES[name], Limits())
    assert time.process_time() - started < 2  # worst seen 0.1 s


def test_refusing_many_values_takes_little_memory():
    body = b"[" + b"[]," * 5_000_000 + b"[]]"
    tracemalloc.start()
    with pytest.raises(ApiError, match="values"):
        parse_json(body, Limits())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * len(body)  # parsed, it would be 20 times as much


BAD_REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "max_tokens -1": ({"max_tokens": -1}, "max_tokens"),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens"),
    "max_tokens 1e9": ({"max_tokens": 1e9}, "max_tokens"),
    "max_tokens 10**9": ({"max_tokens": 10**9}, "max_tokens"),
    "max_tokens text": ({"max_tokens": "5"}, "max_tokens"),
    "max_tokens true": ({"max_tokens": True}, "max_tokens"),
    "max_completion_tokens": ({"max_tokens": None, "max_completion_tokens": 10**9}, "max_tokens"),
    "temperature -1": ({"temperature": -0.1}, "temperature"),
    "temperature 3": ({"temperature": 3}, "temperature"),
    "temperature true": ({"temperature": True}, "temperature"),
    "top_p 2": ({"top_p": 2}, "top_p"),
    "n 1e6": ({"n": 1_000_000}, "n"),
    "n 0": ({"n": 0}, "n"),
    "stop empty": ({"stop": ""}, "stop"),
    "stop with empty": ({"stop": ["a", ""]}, "stop"),
    "stop many": ({"stop": ["a"] * 17}, "stop"),
    "stop long": ({"stop": "a" * 257}, "stop"),
    "seed huge": ({"seed": 1 << 70}, "seed"),
    "no model": ({"model": None}, "model"),
    "logit_bias no id": ({"logit_bias": {"hello": 1}}, "logit_bias"),
    "logit_bias beyond": ({"logit_bias": {"999999": 1}}, "logit_bias"),
    "logit_bias huge": ({"logit_bias": {"1": 1e6}}, "logit_bias"),
    "top_logprobs alone": ({"top_logprobs": 2}, None),
    "top_logprobs 21": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "stream_options alone": ({"stream_options": {"include_usage": True}}, None),
    "top_p -0.1": ({"top_p": -0.1}, "top_p"),
    "min_p 2": ({"min_p": 2}, "min_p"),
    "a tool that must be called": ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    "a form of another kind": ({"response_format": {"type": "grammar"}}, "response_format"),
    "json without a schema": ({"response_format": {"type": "json_schema"}}, "response_format"),
    "a schema that is none": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
        "response_format",
    ),
    "a schema of 40,000 letters": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 40_000]}}}},
        "response_format",
    ),
    "system that says nothing": ({"messages": [{"role": "system", "content": " "}]}, "messages"),
    "audio": ({"modalities": ["text", "audio"]}, "modalities"),
    "no messages": ({"messages": []}, "messages"),
    "10,000 messages": ({"messages": user("a") * 10_000}, "messages"),
    "1,000 images": ({"messages": user("a", *["data:,"] * 1000)}, "messages"),
    "17 images in 17 turns": ({"messages": [m for _ in range(17) for m in user("a", "data:,")]}, "messages"),
    "unknown role": ({"messages": [{"role": "narrator", "content": "a"}]}, "messages"),
    "tool without content": ({"messages": [*user("a"), {"role": "tool", "tool_call_id": "1"}]}, "messages"),
    "call without a name": (
        {"messages": [*user("a"), {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]},
        "messages",
    ),
    "unknown role of a million letters": ({"messages": [{"role": "A" * 1_000_000, "content": "a"}]}, "messages"),
    "image in an answer": (
        {"messages": [*user("a"), {"role": "assistant", "content": user("", "data:,")[0]["content"]}]},
        "messages",
    ),
    "content number": ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    "part of unknown kind": ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages"),
    "too long": ({"messages": user("one " * 3000)}, "messages"),
    "much too long": ({"messages": user("one " * 300_000)}, "messages"),
    "a list": ([], None),
    "text": ("hello", None),
}  # type: ignore[dict-item]


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_values_out_of_range_get_400_and_name_the_field(call: Call, name: str):
    changes, param = BAD_REQUESTS[name]
    body = ask(**changes) if isinstance(changes, dict) else changes
    error = refused(call("POST", CHAT, content=json.dumps(body).encode(), headers=JSON), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400


@pytest.mark.parametrize("name", ["10,000 messages", "1,000 images", "17 images in 17 turns"])
def test_numbers_are_bounded_before_anything_is_looked_at(call: Call, name: str):
    refused(call("POST", CHAT, json=ask(**BAD_REQUESTS[name][0])), 400, "too_many")


def test_a_text_that_is_much_too_long_is_not_even_tokenized(call: Call):
    error = refused(call("POST", CHAT, json=ask(messages=user("one " * 300_000))), 400, "context_length_exceeded")
    assert "1,200,000 characters" in error["message"]


def test_the_largest_values_allowed_are_taken(call: Call):
    """Refusals above are not those of everything."""
    good: Iterator[dict[str, Any]] = iter(
        [
            {"max_tokens": 900, "logit_bias": {"2": 100}},
            {"temperature": 2, "top_p": 1, "n": 8, "seed": (1 << 63) - 1},
            {"stop": ["a" * 256] * 16, "max_tokens": 5.0},
            {"messages": [{"role": "user", "content": "a"}] * 256},
            {"top_p": 0, "stop": [], "min_p": 1, "temperature": 1},
            dict.fromkeys(("temperature", "top_p", "n", "stop", "seed", "stream", "logprobs", "tools")),
        ]
    )
    for changes in good:
        assert call("POST", CHAT, json=ask(**changes)).status_code == 200, changes


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_body_that_a_web_page_may_send_unasked_is_no_json(call: Call, kind: str):
    refused(call("POST", CHAT, content=json.dumps(ask()), headers={"content-type": kind}), 415)


@pytest.mark.parametrize(("method", "path", "status"), [("GET", CHAT, 405), ("GET", "/v1/nothing", 404)])
def test_addresses_that_do_not_exist_answer_in_the_same_shape(call: Call, method: str, path: str, status: int):
    refused(call(method, path), status)
