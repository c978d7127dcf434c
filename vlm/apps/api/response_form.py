"""How `/v1/responses` is answered, in OpenAI's words: one message, in a response that is told whole at its end."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from vlm.apps.api.answers import Written, sse
from vlm.apps.api.choice import Event
from vlm.apps.api.errors import ApiError
from vlm.apps.api.response_schemas import (
    IncompleteDetails,
    OutputMessage,
    OutputText,
    OutputTokenLogprob,
    Response,
    ResponseError,
    ResponseRequest,
    ResponseUsage,
    Status,
)
from vlm.apps.api.service import Generation

_PLACE = {"output_index": 0, "content_index": 0}  # of the only text


class ResponseForm:
    end = b""  # the last event says that it is the last

    def __init__(self, generation: Generation, name: str, request: ResponseRequest) -> None:
        self._generation = generation
        self._name = name
        self._request = request
        self._id = f"resp_{uuid.uuid4().hex}"
        self._message_id = f"msg_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._number = -1  # of the last event

    def whole(self, choices: list[Written]) -> dict[str, Any]:
        (choice,) = choices
        return self._response(_status_of(choice), choice)

    async def frames(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress", None))
        empty = self._message("in_progress", None)
        yield self._event("response.output_item.added", output_index=0, item=empty)
        yield self._event("response.content_part.added", **self._place(), part=_text(Written()))
        written = Written()
        async for event in events:
            one = Written()
            one.add(event)
            written.add(event)
            if one.text or one.logprobs:
                logprobs = _text(one)["logprobs"]
                yield self._event("response.output_text.delta", **self._place(), delta=one.text, logprobs=logprobs)
        for frame in self._ends(written):
            yield frame

    def failed(self, error: ApiError) -> bytes:
        values = self._response("failed", None, ResponseError(code=error.code or "server_error", message=error.message))
        told = {"code": error.code, "message": error.message, "param": error.param}
        return self._event("error", **told) + self._event("response.failed", response=values)

    def _ends(self, written: Written) -> list[bytes]:
        status = _status_of(written)
        text = _text(written)
        said = {"text": text["text"], "logprobs": text["logprobs"]}
        return [
            self._event("response.output_text.done", **self._place(), **said),
            self._event("response.content_part.done", **self._place(), part=text),
            self._event("response.output_item.done", output_index=0, item=self._message(status, written)),
            self._event(f"response.{status}", response=self._response(status, written)),
        ]

    def _place(self) -> dict[str, Any]:
        return {**_PLACE, "item_id": self._message_id}

    def _event(self, kind: str, **values: Any) -> bytes:
        self._number += 1
        return sse({"type": kind, "sequence_number": self._number, **values}, event=kind)

    def _message(self, status: Status, written: Written | None) -> dict[str, Any]:
        content = [] if written is None else [OutputText.model_validate(_text(written))]
        return OutputMessage(id=self._message_id, status=status, content=content).model_dump(mode="json")

    def _response(self, status: Status, written: Written | None, error: ResponseError | None = None) -> dict[str, Any]:
        asked, format = self._request, self._request.format
        return Response(
            id=self._id,
            created_at=self._created,
            status=status,
            error=error,
            incomplete_details=IncompleteDetails() if status == "incomplete" else None,
            instructions=asked.instructions,
            max_output_tokens=asked.max_output_tokens,
            metadata=asked.metadata or {},
            model=self._name,
            output=[] if written is None else [OutputMessage.model_validate(self._message(status, written))],
            temperature=1.0 if asked.temperature is None else asked.temperature,
            text={"format": {"type": "text"} if format is None else format.model_dump(exclude_none=True)},
            top_p=1.0 if asked.top_p is None else asked.top_p,
            usage=None if written is None else self._usage(),
        ).model_dump(mode="json")

    def _usage(self) -> ResponseUsage:
        read, new = self._generation.num_prompt_tokens, self._generation.num_new_tokens
        return ResponseUsage(input_tokens=read, output_tokens=new, total_tokens=read + new)


def _status_of(written: Written) -> Status:
    return "completed" if written.reason == "stop" else "incomplete"


def _text(written: Written) -> dict[str, Any]:
    logprobs = [OutputTokenLogprob.of(token) for token in written.logprobs or ()]
    return OutputText(text=written.text, logprobs=logprobs).model_dump(mode="json")
