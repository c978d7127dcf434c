"""Events of a generation -> one JSON answer, or a stream of server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Literal

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from vlm.chat.api.choice import End, Piece
from vlm.chat.api.errors import ApiError, timed_out
from vlm.chat.api.schemas import (
    Choice,
    Chunk,
    ChunkChoice,
    Completion,
    Delta,
    Logprobs,
    ReplyMessage,
    TokenLogprob,
    Usage,
)
from vlm.chat.api.service import Generation, Place, Service, first_of
from vlm.logs import log

_GRACE_SECONDS = 10.0
_SSE_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]


class Answer(Response):
    """Sends the replies, all at once or as they grow, and gives up when the client leaves or its time is over.

    Args:
        place: is left when the answer has ended, in whatever way.
        deadline: a time of the event loop.
    """

    def __init__(
        self, service: Service, generation: Generation, place: Place, deadline: float, stream: bool, usage: bool
    ) -> None:
        super().__init__()
        self._service = service
        self._generation = generation
        self._place = place
        self._deadline = deadline
        self._stream = stream
        self._usage = usage
        place.kept = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._send_stream(send) if self._stream else self._send_whole(scope, receive, send)
        try:
            # the writers below keep to the deadline; this one is for a client that does not read what it is sent
            done = await first_of(work, client_left(receive), self._deadline + _GRACE_SECONDS)
            if done is None:
                self._service.metrics.cancelled.inc()
        except TimeoutError:
            log("a client did not take its reply; the connection is closed")
        finally:
            self._generation.close()
            self._place.leave()

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> Literal[True]:
        try:
            async with asyncio.timeout_at(self._deadline):
                response: Response = JSONResponse((await self._collect()).model_dump(mode="json"))
        except TimeoutError:
            response = timed_out(self._service.limits.request_seconds).response()
        except ApiError as error:
            response = error.response()
        await response(scope, receive, send)
        return True

    async def _collect(self) -> Completion:
        texts: dict[int, str] = {}
        logprobs: dict[int, list[TokenLogprob]] = {}
        reasons: dict[int, Any] = {}
        async for event in self._generation.events():
            if isinstance(event, End):
                reasons[event.index] = event.reason
                continue
            texts[event.index] = texts.get(event.index, "") + event.text
            if event.logprobs is not None:
                logprobs.setdefault(event.index, []).extend(event.logprobs.content)
        choices = [
            Choice(
                index=index,
                message=ReplyMessage(content=texts.get(index, "")),
                logprobs=Logprobs(content=logprobs[index]) if index in logprobs else None,
                finish_reason=reasons[index],
            )
            for index in sorted(reasons)
        ]
        generation = self._generation
        return Completion(
            id=generation.id,
            created=generation.created,
            model=self._service.name,
            choices=choices,
            usage=usage_of(generation),
        )

    async def _send_stream(self, send: Send) -> Literal[True]:
        await send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
        error: ApiError | None = None
        try:
            async with asyncio.timeout_at(self._deadline):
                async for data in self._chunks():
                    await _send_event(send, data)
        except TimeoutError:
            error = timed_out(self._service.limits.request_seconds)
        except ApiError as failed:
            error = failed
        if error is not None:  # the status has been sent; clients know an error by its key
            await _send_event(send, _encode(error.body))
        await _send_event(send, b"[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True

    async def _chunks(self) -> AsyncIterator[bytes]:
        started: set[int] = set()
        async for event in self._generation.events():
            if event.index not in started:
                started.add(event.index)
                yield self._chunk(ChunkChoice(index=event.index, delta=Delta(role="assistant", content="")))
            if isinstance(event, Piece):
                delta = Delta(content=event.text)
                yield self._chunk(ChunkChoice(index=event.index, delta=delta, logprobs=event.logprobs))
            else:
                assert not isinstance(event.reason, ApiError)
                yield self._chunk(ChunkChoice(index=event.index, delta=Delta(), finish_reason=event.reason))
        if self._usage:
            yield self._chunk(None)

    def _chunk(self, choice: ChunkChoice | None) -> bytes:
        """One event; without a choice, the last one, which tells the usage."""
        chunk = Chunk(
            id=self._generation.id,
            created=self._generation.created,
            model=self._service.name,
            choices=[] if choice is None else [choice],
            usage=usage_of(self._generation) if choice is None else None,
        )
        values = chunk.model_dump(mode="json")
        for written in values["choices"]:
            written["delta"] = {key: value for key, value in written["delta"].items() if value is not None}
        if not self._usage:
            del values["usage"]
        return _encode(values)


async def client_left(receive: Receive) -> None:
    """Returns when the client has closed the connection. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def usage_of(generation: Generation) -> Usage:
    return Usage(
        prompt_tokens=generation.num_prompt_tokens,
        completion_tokens=generation.num_new_tokens,
        total_tokens=generation.num_prompt_tokens + generation.num_new_tokens,
    )


def _encode(values: dict[str, Any]) -> bytes:
    return bytes(JSONResponse(values).body)


async def _send_event(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})
