"""Chats as OpenAI's API writes them, the answers to them, and what all routes answer with."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from vlm.apps.api.fields import GenerationRequest, Positive, Schema, Sent, UpTo20


class TextPart(Sent):
    type: Literal["text"]
    text: str


class ImageUrl(Sent):
    url: str = Field(description="data:image/...;base64,... ; a file below --media-root; or https://HOST/... of a host that --allow-media-domain names")  # fmt: skip  # noqa: E501
    detail: str | None = Field(None, description="Read, but changes nothing.")


def _as_image_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class ImagePart(Sent):
    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_as_image_url, json_schema_input_type=str | ImageUrl)]


class RefusalPart(Sent):
    type: Literal["refusal"]
    refusal: str


UserPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]
ReplyPart = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


def _as_parts(value: Any) -> Any:
    """A text is one part, so that an error in a list of parts names the part and not the other form."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _text_or(parts: Any) -> BeforeValidator:
    return BeforeValidator(_as_parts, json_schema_input_type=str | parts)


class SystemMessage(Sent):
    role: Literal["system", "developer"]
    content: Annotated[list[TextPart], _text_or(list[TextPart])]


class UserMessage(Sent):
    role: Literal["user"]
    content: Annotated[list[UserPart], _text_or(list[UserPart])]


class FunctionCall(Sent):
    name: str
    arguments: str = Field(description="JSON, or what a model wrote for it.")

    @property
    def text(self) -> str:
        """The call as training data writes it, a turn of JSON. Arguments stay spelled as they came."""
        try:
            json.loads(self.arguments)
            arguments = self.arguments.strip()
        except (ValueError, RecursionError):
            arguments = json.dumps(self.arguments, ensure_ascii=False)
        return f'{{"name": {json.dumps(self.name, ensure_ascii=False)}, "arguments": {arguments}}}'


class ToolCall(Sent):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ToolMessage(Sent):
    """What a tool gave back: text of the user's turn, as in training data."""

    role: Literal["tool", "function"]
    content: Annotated[list[TextPart], _text_or(list[TextPart])]
    tool_call_id: str | None = None
    name: str | None = None


class AssistantMessage(Sent):
    role: Literal["assistant"]
    content: Annotated[list[ReplyPart], _text_or(list[ReplyPart])] | None = None
    refusal: str | None = Field(None, description="Stands for content that is missing.")
    tool_calls: list[ToolCall] | None = Field(None, description="Calls of another model; read as text of the reply.")
    function_call: FunctionCall | None = Field(None, description="The older form of tool_calls.")

    @property
    def calls(self) -> list[FunctionCall]:
        given = [call.function for call in self.tool_calls or ()]
        return given if self.function_call is None else [*given, self.function_call]


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class JsonSchema(Sent):
    model_config = ConfigDict(serialize_by_alias=True)

    name: str | None = Field(None, description="Changes nothing.")
    description: str | None = Field(None, description="Changes nothing.")
    json_schema: dict[str, Any] | None = Field(None, alias="schema", description="None: any object.")
    strict: bool | None = Field(None, description="Changes nothing: a schema is always kept to.")


class ResponseFormat(Sent):
    model_config = ConfigDict(serialize_by_alias=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    bare_schema: dict[str, Any] | None = Field(None, alias="schema", description="Where llama.cpp has the schema.")

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None and self.bare_schema is None:
            raise ValueError("type json_schema needs json_schema: {name, schema}")
        return self

    @property
    def schema_to_keep(self) -> dict[str, Any] | None:
        """What a reply must be, as a JSON schema; None for any text."""
        if self.type == "text":
            return None
        schema = None if self.json_schema is None else self.json_schema.json_schema
        return schema or self.bare_schema or {"type": "object"}


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, description="A reply at their end is gone on with.")
    max_completion_tokens: Positive | None = Field(None, description="The newer name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: UpTo20 | None = Field(None, description="Needs logprobs.")
    response_format: ResponseFormat | None = Field(None, description="JSON needs the extra vlm[json].")

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class Usage(Schema):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(Schema):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(Schema):
    content: list[TokenLogprob]


FinishReason = Literal["stop", "length"]


class ReplyMessage(Schema):
    role: Literal["assistant"] = "assistant"
    content: str


class Choice(Schema):
    index: int
    message: ReplyMessage
    logprobs: Logprobs | None = None
    finish_reason: FinishReason


class Completion(Schema):
    """Answer to POST /v1/chat/completions without `stream`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(Schema):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Schema):
    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


class Chunk(Schema):
    """One event of the answer with `stream`. The stream ends with the event `[DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelCard(Schema):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vlm"


class ModelList(Schema):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(Schema):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Schema):
    error: ErrorDetail


class Health(Schema):
    status: Literal["ok", "draining", "failed"]
    model: str
    running: int
    waiting: int
