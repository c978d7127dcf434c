"""The routes that generate: a body within bounds, a request, its generation, and the answer in the route's form."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from vlm.apps.api.answers import Answer, Form
from vlm.apps.api.body import read_json
from vlm.apps.api.errors import timed_out
from vlm.apps.api.fields import Sent
from vlm.apps.api.forms import ChatForm, TextForm
from vlm.apps.api.parse import parse_request
from vlm.apps.api.response_form import ResponseForm
from vlm.apps.api.response_schemas import Response as WholeResponse
from vlm.apps.api.response_schemas import ResponseRequest
from vlm.apps.api.schemas import ChatRequest, Completion
from vlm.apps.api.service import Generation, Service
from vlm.apps.api.text_schemas import TextCompletion, TextRequest
from vlm.apps.api.unread import HEADER, header_value, unread_keys

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
# what a body becomes: the request, what is generated for it, and the form of the answer
Started = tuple[Sent, Generation, Form]


def add_generation(app: FastAPI, service: Service, errors: dict[int | str, dict[str, Any]]) -> None:
    """
    Args:
        errors: answers of these routes beside 200, for the document.
    """

    @app.post(CHAT, response_model=Completion, responses=errors, summary="Continue a conversation")
    async def chat_completions(request: Request) -> Response:
        async def start(body: Any, hold: Callable[[int], None]) -> Started:
            asked = parse_request(body, ChatRequest, service.limits)
            generation = await service.start(asked, hold, "messages")
            return asked, generation, ChatForm(generation, service.name, asked.wants_usage)

        return await _answer(service, request, start)

    @app.post(TEXT, response_model=TextCompletion, responses=errors, summary="Continue a text as it is")
    async def completions(request: Request) -> Response:
        async def start(body: Any, hold: Callable[[int], None]) -> Started:
            asked = parse_request(body, TextRequest, service.limits)
            generation = await service.start(asked, hold, "prompt")
            return asked, generation, TextForm(generation, service.name, asked.wants_usage, _echoes(service, asked))

        return await _answer(service, request, start)

    @app.post(RESPONSES, response_model=WholeResponse, responses=errors, summary="Answer, storing nothing")
    async def create_response(request: Request) -> Response:
        async def start(body: Any, hold: Callable[[int], None]) -> Started:
            asked = parse_request(body, ResponseRequest, service.limits)
            generation = await service.start(asked.as_chat(), hold, "input", "text.format")
            return asked, generation, ResponseForm(generation, service.name, asked)

        return await _answer(service, request, start)


async def _answer(
    service: Service, request: Request, start: Callable[[Any, Callable[[int], None]], Awaitable[Started]]
) -> Response:
    deadline = asyncio.get_running_loop().time() + service.limits.request_seconds
    with service.place() as place:
        try:
            async with asyncio.timeout_at(deadline):
                body = await read_json(request, service.limits, place.hold)
                asked, generation, form = await start(body, place.hold)
        except TimeoutError:
            raise timed_out(service.limits.request_seconds) from None
        place.let_go()
        unread = unread_keys(asked)
        service.note(unread)
        headers = {HEADER: header_value(unread)} if unread else {}
        streams = bool(getattr(asked, "stream", False))
        return Answer(service, generation, form, place, deadline, stream=streams, headers=headers)


def _echoes(service: Service, asked: TextRequest) -> list[str]:
    """Of each choice, what stands before its reply."""
    decode = service.loaded.conversation_tokenizer.decode
    shown = [prompt if isinstance(prompt, str) else decode(prompt) for prompt in asked.prompt if asked.echo]
    return [text for text in shown or [""] * len(asked.prompt) for _ in range(asked.n or 1)]
