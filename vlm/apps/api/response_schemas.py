"""Responses (`POST /v1/responses`) as OpenAI's API writes them. Nothing is stored: a request brings all of its chat."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from vlm.apps.api.fields import AnyWhole, Positive, RepetitionPenalty, Schema, Sent, Share, TopK, UpTo20
from vlm.apps.api.schemas import (
    ChatRequest,
    FunctionCall,
    JsonSchema,
    RefusalPart,
    ResponseFormat,
    TokenLogprob,
    TopLogprob,
)

_SAME_IN_A_CHAT = ("model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stream")
LOGPROBS = "message.output_text.logprobs"  # of `include`


class InputText(Sent):
    type: Literal["input_text", "output_text", "text"]
    text: str


class InputImage(Sent):
    type: Literal["input_image"]
    image_url: str = Field(description="As in a chat.")
    detail: str | None = Field(None, description="Read, but changes nothing.")


InputPart = Annotated[InputText | InputImage | RefusalPart, Field(discriminator="type")]


def _as_parts(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


class InputMessage(Sent):
    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[list[InputPart], BeforeValidator(_as_parts, json_schema_input_type=str | list[InputPart])]

    @model_validator(mode="after")
    def _shows_images_as_a_user(self) -> InputMessage:
        if self.role != "user" and any(isinstance(part, InputImage) for part in self.content):
            raise ValueError(f"an input_image stands in a message of role {self.role}; only a user shows images")
        return self


class ReasoningItem(Sent):
    """Thoughts of another model; read over."""

    type: Literal["reasoning"]


class CallItem(FunctionCall):
    """A call of another model; read as text of the reply."""

    type: Literal["function_call"]
    call_id: str | None = None
    id: str | None = None
    status: str | None = None


class CallOutputItem(Sent):
    """What a tool gave back: text of the user's turn."""

    type: Literal["function_call_output"]
    call_id: str | None = None
    id: str | None = None
    status: str | None = None
    output: Annotated[list[InputText], BeforeValidator(_as_parts, json_schema_input_type=str | list[InputText])]


def _kind_of_item(value: Any) -> Any:
    kind = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")],
    Discriminator(_kind_of_item),
]


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class TextFormat(JsonSchema):
    type: Literal["text", "json_object", "json_schema"]

    @model_validator(mode="after")
    def _has_schema(self) -> TextFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type json_schema needs schema")
        return self


class TextSettings(Sent):
    format: TextFormat | None = None


class ResponseRequest(Sent):
    """Body of POST /v1/responses."""

    model: str = Field(description="The name that /v1/models lists.")
    input: Annotated[
        list[InputItem],
        Field(min_length=1),
        BeforeValidator(_as_items, json_schema_input_type=str | list[InputItem]),
    ] = Field(description="A question, or messages; a reply at their end is gone on with.")
    instructions: str | None = Field(None, description="System text before the input.")
    max_output_tokens: Positive | None = Field(None, description="Longest reply, in tokens.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest token each time; default 1.")
    top_p: Share | None = None
    top_k: TopK | None = Field(None, description="Beyond OpenAI's API.")
    min_p: Share | None = Field(None, description="Beyond OpenAI's API.")
    repetition_penalty: RepetitionPenalty | None = Field(None, description="Beyond OpenAI's API.")
    seed: AnyWhole | None = Field(None, description="Beyond OpenAI's API. Same seed, same draws.")
    stream: bool | None = None
    include: list[str] | None = Field(None, description=f"{LOGPROBS} reports log-probabilities.")
    top_logprobs: UpTo20 | None = None
    text: TextSettings | None = Field(None, description="JSON needs the extra vlm[json].")
    metadata: dict[str, str] | None = Field(None, description="Given back.")

    @model_validator(mode="after")
    def _says_something(self) -> ResponseRequest:
        if all(isinstance(item, ReasoningItem) for item in self.input):
            raise ValueError("input: there is no message in it")
        return self

    def as_chat(self) -> ChatRequest:
        """The same question as a chat. Values were checked; what they mean together is checked where it is used."""
        given = self.model_dump(
            include={"model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"}
        )
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        messages += [_chat_message(item) for item in self.input if not isinstance(item, ReasoningItem)]
        wants_logprobs = LOGPROBS in (self.include or ()) or self.top_logprobs is not None
        return ChatRequest.model_validate(
            {
                **given,
                "messages": messages,
                "max_completion_tokens": self.max_output_tokens,
                "logprobs": wants_logprobs or None,
                "top_logprobs": (self.top_logprobs or 0) if wants_logprobs else None,
                "response_format": _chat_format(self.format),
            }
        )

    @property
    def format(self) -> TextFormat | None:
        return None if self.text is None else self.text.format


def _chat_message(item: InputMessage | CallItem | CallOutputItem) -> dict[str, Any]:
    if isinstance(item, CallItem):
        function = {"name": item.name, "arguments": item.arguments}
        return {"role": "assistant", "tool_calls": [{"function": function}]}
    if isinstance(item, CallOutputItem):
        return {"role": "tool", "content": [_chat_part(part) for part in item.output]}
    return {"role": item.role, "content": [_chat_part(part) for part in item.content]}


def _chat_part(part: InputText | InputImage | RefusalPart) -> dict[str, Any]:
    if isinstance(part, InputImage):
        return {"type": "image_url", "image_url": {"url": part.image_url}}
    return {"type": "text", "text": part.text if isinstance(part, InputText) else part.refusal}


def _chat_format(given: TextFormat | None) -> ResponseFormat | None:
    if given is None:
        return None
    return ResponseFormat.model_validate({"type": given.type, "schema": given.json_schema})


class OutputLogprob(Schema):
    token: str
    bytes: list[int]
    logprob: float


class OutputTokenLogprob(OutputLogprob):
    top_logprobs: list[OutputLogprob]

    @classmethod
    def of(cls, token: TokenLogprob) -> OutputTokenLogprob:
        return cls(**_spelled(token), top_logprobs=[OutputLogprob(**_spelled(top)) for top in token.top_logprobs])


def _spelled(token: TopLogprob) -> dict[str, Any]:
    return {"token": token.token, "bytes": token.bytes or [], "logprob": token.logprob}


class OutputText(Schema):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[OutputTokenLogprob] = Field(default_factory=list)


Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputMessage(Schema):
    type: Literal["message"] = "message"
    id: str
    status: Status
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class InputTokensDetails(Schema):
    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputTokensDetails(Schema):
    reasoning_tokens: int = 0


class ResponseUsage(Schema):
    input_tokens: int
    input_tokens_details: InputTokensDetails = InputTokensDetails()
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class IncompleteDetails(Schema):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseError(Schema):
    code: str
    message: str


class Response(Schema):
    """Answer to POST /v1/responses without `stream`; with it, the last of its events holds one."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    store: bool = False
    temperature: float
    text: dict[str, Any]
    tool_choice: Literal["none"] = "none"
    tools: list[Any] = Field(default_factory=list)
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None
