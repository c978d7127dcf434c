"""Events of a generation -> one JSON answer, or a stream of server-sent events, in the form of its route."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Literal, Protocol

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from vlm.apps.api.choice import End, Event
from vlm.apps.api.errors import ApiError, timed_out
from vlm.apps.api.schemas import FinishReason, TokenLogprob
from vlm.apps.api.service import Generation, Place, Service, first_of
from vlm.logs import log

_GRACE_SECONDS = 10.0
_SSE_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "x-accel-buffering": "no"}


class Written:
    """One choice that is complete."""

    def __init__(self) -> None:
        self.text = ""
        self.logprobs: list[TokenLogprob] | None = None
        self.reason: FinishReason = "stop"

    def add(self, event: Event) -> None:
        if isinstance(event, End):
            assert not isinstance(event.reason, ApiError)
            self.reason = event.reason
            return
        self.text += event.text
        if event.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *event.logprobs.content]


class Form(Protocol):
    """How one route writes an answer."""

    end: bytes  # of a stream, the last event

    def whole(self, choices: list[Written]) -> dict[str, Any]:
        """The answer at once."""

    def frames(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        """The answer as it grows, as server-sent events."""

    def failed(self, error: ApiError) -> bytes:
        """What ends a stream that has begun instead: its status has been sent."""


class Answer(Response):
    """Sends the replies, all at once or as they grow, and gives up when the client leaves or its time is over.

    Args:
        place: is left when the answer has ended, in whatever way.
        deadline: a time of the event loop.
        headers: to send with it.
    """

    def __init__(
        self,
        service: Service,
        generation: Generation,
        form: Form,
        place: Place,
        deadline: float,
        *,
        stream: bool,
        headers: dict[str, str],
    ) -> None:
        super().__init__()
        self._service = service
        self._generation = generation
        self._form = form
        self._place = place
        self._deadline = deadline
        self._stream = stream
        self._headers_to_send = headers
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
                values = self._form.whole(await self._collect())
                response: Response = JSONResponse(values, headers=self._headers_to_send)
        except TimeoutError:
            response = timed_out(self._service.limits.request_seconds).response()
        except ApiError as error:
            response = error.response()
        await response(scope, receive, send)
        return True

    async def _collect(self) -> list[Written]:
        choices: dict[int, Written] = {}
        async for event in self._generation.events():
            choices.setdefault(event.index, Written()).add(event)
        return [choices[index] for index in sorted(choices)]

    async def _send_stream(self, send: Send) -> Literal[True]:
        headers = [(name.encode(), value.encode()) for name, value in (_SSE_HEADERS | self._headers_to_send).items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        error: ApiError | None = None
        try:
            async with asyncio.timeout_at(self._deadline):
                async for frame in self._form.frames(self._generation.events()):
                    await _send_frame(send, frame)
        except TimeoutError:
            error = timed_out(self._service.limits.request_seconds)
        except ApiError as failed:
            error = failed
        if error is not None:
            await _send_frame(send, self._form.failed(error))
        if self._form.end:
            await _send_frame(send, self._form.end)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True


def sse(values: dict[str, Any], event: str | None = None) -> bytes:
    """One server-sent event."""
    name = f"event: {event}\n".encode() if event else b""
    return name + b"data: " + bytes(JSONResponse(values).body) + b"\n\n"


async def client_left(receive: Receive) -> None:
    """Returns when the client has closed the connection. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_frame(send: Send, frame: bytes) -> None:
    await send({"type": "http.response.body", "body": frame, "more_body": True})
