"""How chats and plain completions are answered, in OpenAI's words."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from vlm.apps.api.answers import Written, sse
from vlm.apps.api.choice import Event, Piece
from vlm.apps.api.errors import ApiError
from vlm.apps.api.schemas import (
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
from vlm.apps.api.service import Generation
from vlm.apps.api.text_schemas import TextChoice, TextCompletion, TextLogprobs

_DONE = b"data: [DONE]\n\n"


class ChatForm:
    """`/v1/chat/completions`."""

    end = _DONE

    def __init__(self, generation: Generation, name: str, wants_usage: bool) -> None:
        self._generation = generation
        self._wants_usage = wants_usage
        self._common: dict[str, Any] = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": name}

    def whole(self, choices: list[Written]) -> dict[str, Any]:
        written = [
            Choice(
                index=index,
                message=ReplyMessage(content=choice.text),
                logprobs=None if choice.logprobs is None else Logprobs(content=choice.logprobs),
                finish_reason=choice.reason,
            )
            for index, choice in enumerate(choices)
        ]
        return Completion(**self._common, choices=written, usage=usage_of(self._generation)).model_dump(mode="json")

    async def frames(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        started: set[int] = set()
        async for event in events:
            if event.index not in started:
                started.add(event.index)
                yield self._chunk(ChunkChoice(index=event.index, delta=Delta(role="assistant", content="")))
            if isinstance(event, Piece):
                delta = Delta(content=event.text)
                yield self._chunk(ChunkChoice(index=event.index, delta=delta, logprobs=event.logprobs))
            else:
                assert not isinstance(event.reason, ApiError)
                yield self._chunk(ChunkChoice(index=event.index, delta=Delta(), finish_reason=event.reason))
        if self._wants_usage:
            yield self._chunk(None)

    def failed(self, error: ApiError) -> bytes:
        return sse(error.body)  # clients know an error by its key

    def _chunk(self, choice: ChunkChoice | None) -> bytes:
        """One event; without a choice, the last one, which tells the usage."""
        usage = usage_of(self._generation) if choice is None else None
        values = Chunk(**self._common, choices=[] if choice is None else [choice], usage=usage).model_dump(mode="json")
        for written in values["choices"]:
            written["delta"] = {key: value for key, value in written["delta"].items() if value is not None}
        if not self._wants_usage:
            del values["usage"]
        return sse(values)


class TextForm:
    """`/v1/completions`.

    Args:
        echoes: of each choice, the prompt to put before it, or "".
    """

    end = _DONE

    def __init__(self, generation: Generation, name: str, wants_usage: bool, echoes: Sequence[str]) -> None:
        self._generation = generation
        self._wants_usage = wants_usage
        self._echoes = echoes
        self._common: dict[str, Any] = {"id": new_id("cmpl"), "created": int(time.time()), "model": name}

    def whole(self, choices: list[Written]) -> dict[str, Any]:
        written = [
            TextChoice(
                index=index,
                text=self._echoes[index] + choice.text,
                logprobs=None if choice.logprobs is None else self._logprobs(choice.logprobs, len(self._echoes[index])),
                finish_reason=choice.reason,
            )
            for index, choice in enumerate(choices)
        ]
        completion = TextCompletion(**self._common, choices=written, usage=usage_of(self._generation))
        return completion.model_dump(mode="json")

    async def frames(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        sent: dict[int, int] = {}  # characters of each choice
        async for event in events:
            if event.index not in sent:
                sent[event.index] = len(self._echoes[event.index])
                if self._echoes[event.index]:
                    yield self._chunk(TextChoice(index=event.index, text=self._echoes[event.index]))
            if isinstance(event, Piece):
                offset = sent[event.index]
                logprobs = None if event.logprobs is None else self._logprobs(event.logprobs.content, offset)
                yield self._chunk(TextChoice(index=event.index, text=event.text, logprobs=logprobs))
                sent[event.index] += len(event.text)
            else:
                assert not isinstance(event.reason, ApiError)
                yield self._chunk(TextChoice(index=event.index, text="", finish_reason=event.reason))
        if self._wants_usage:
            yield self._chunk(None)

    def failed(self, error: ApiError) -> bytes:
        return sse(error.body)

    def _chunk(self, choice: TextChoice | None) -> bytes:
        usage = usage_of(self._generation) if choice is None else None
        completion = TextCompletion(**self._common, choices=[] if choice is None else [choice], usage=usage)
        return sse(completion.model_dump(mode="json", exclude=None if self._wants_usage else {"usage"}))

    def _logprobs(self, tokens: Sequence[TokenLogprob], offset: int) -> TextLogprobs:
        offsets = [offset]
        for token in tokens:
            offsets.append(offsets[-1] + len(token.token))
        return TextLogprobs(
            tokens=[token.token for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[{top.token: top.logprob for top in token.top_logprobs} for token in tokens],
            text_offset=offsets[:-1],
        )


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def usage_of(generation: Generation) -> Usage:
    return Usage(
        prompt_tokens=generation.num_prompt_tokens,
        completion_tokens=generation.num_new_tokens,
        total_tokens=generation.num_prompt_tokens + generation.num_new_tokens,
    )
