"""Requests and answers of the API, as OpenAI writes them. Fields that change nothing here are let through unread."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from vlm.chat.api.errors import ApiError
from vlm.chat.api.limits import Limits

_MAX_INT = (1 << 63) - 1


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 5.0 is the integer 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Positive = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
NotNegative = Annotated[int, Field(ge=0, le=_MAX_INT), BeforeValidator(_whole)]
AnyWhole = Annotated[int, Field(ge=-_MAX_INT, le=_MAX_INT), BeforeValidator(_whole)]
UpTo20 = Annotated[int, Field(ge=0, le=20), BeforeValidator(_whole)]
StopText = Annotated[str, StringConstraints(min_length=1)]


class _Schema(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class TextPart(_Schema):
    type: Literal["text"]
    text: str


class ImageUrl(_Schema):
    url: str = Field(description="data:image/...;base64,... ; a file below --media-root; or https://HOST/... of a host that --allow-media-domain names")  # fmt: skip  # noqa: E501
    detail: Literal["auto", "low", "high"] | None = Field(None, description="Read, but changes nothing.")


class ImagePart(_Schema):
    type: Literal["image_url"]
    image_url: ImageUrl


class SystemMessage(_Schema):
    role: Literal["system", "developer"]
    content: str | list[TextPart]


class UserMessage(_Schema):
    role: Literal["user"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class AssistantMessage(_Schema):
    role: Literal["assistant"]
    content: str | list[TextPart] | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Schema):
    include_usage: bool | None = Field(None, description="Send a last chunk that holds only the usage.")


class ResponseFormat(_Schema):
    type: Literal["text"] = Field(description="Only plain text can be asked for.")


class ChatRequest(_Schema):
    """Body of POST /v1/chat/completions."""

    model: str = Field(description="The name that /v1/models lists.")
    messages: list[Message] = Field(min_length=1, description="The last one is the user's.")
    max_tokens: Positive | None = Field(None, description="Longest reply, in tokens.")
    max_completion_tokens: Positive | None = Field(None, description="The newer name of max_tokens.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest token each time; default 1.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: NotNegative | None = Field(None, description="Beyond OpenAI's API. 0 considers all tokens.")
    repetition_penalty: float | None = Field(None, ge=0.1, le=10, description="Beyond OpenAI's API. 1 is none.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=1024, description="Token id -> added to its logit."
    )
    seed: AnyWhole | None = Field(None, description="Same seed, same draws.")
    stop: StopText | Annotated[list[StopText], Field(min_length=1)] | None = None
    n: Positive | None = Field(None, description="Replies to the same messages.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: UpTo20 | None = Field(None, description="Needs logprobs.")
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


# Fields of OpenAI's API that would change the reply, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "web_search_options": (None,),
}


def parse_request(value: Any, limits: Limits) -> ChatRequest:
    """
    Raises:
        ApiError: 400, naming the first field that is wrong.
    """
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", "invalid_request")
    for name, neutral in _UNSUPPORTED.items():
        if value.get(name) not in neutral:
            raise ApiError(400, f"{name} is not supported by this server; leave it out", "unsupported", name)
    messages = value.get("messages")
    if isinstance(messages, list) and len(messages) > limits.max_messages:
        raise _too_many("messages", len(messages), limits.max_messages)
    try:
        request = ChatRequest.model_validate(value)
    except ValidationError as error:
        raise _explained(error) from None
    _check_limits(request, limits)
    return request


def _check_limits(request: ChatRequest, limits: Limits) -> None:
    if (request.n or 1) > limits.max_choices:
        raise _too_many("n", request.n or 1, limits.max_choices)
    if len(request.stops) > limits.max_stops:
        raise _too_many("stop", len(request.stops), limits.max_stops)
    if any(len(text) > limits.stop_length for text in request.stops):
        raise ApiError(400, f"a stop text is longer than {limits.stop_length} characters", "invalid_request", "stop")
    num_images = sum(
        isinstance(part, ImagePart)
        for message in request.messages
        if isinstance(message.content, list)
        for part in message.content
    )
    if num_images > limits.max_images:
        raise _too_many("messages", num_images, limits.max_images, "pictures")


def _too_many(param: str, got: int, limit: int, what: str | None = None) -> ApiError:
    return ApiError(400, f"{param}: {got:,} {what or ''}".rstrip() + f", at most {limit:,}", "too_many", param)


def _explained(error: ValidationError) -> ApiError:
    """The first problem, in few words: some of pydantic's quote what was sent."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    place = ""
    for step in first["loc"]:
        place += f"[{step}]" if isinstance(step, int) else f".{step}" if place else step
    param = str(first["loc"][0]) if first["loc"] else None
    message = str(first["msg"]).removeprefix("Value error, ")[:200]
    return ApiError(400, f"{place[:120]}: {message}" if place else message, "invalid_request", param)


class Usage(_Schema):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(_Schema):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(_Schema):
    content: list[TokenLogprob]


class ReplyMessage(_Schema):
    role: Literal["assistant"] = "assistant"
    content: str


class Choice(_Schema):
    index: int
    message: ReplyMessage
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"]


class Completion(_Schema):
    """Answer to POST /v1/chat/completions without `stream`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(_Schema):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(_Schema):
    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Chunk(_Schema):
    """One event of the answer with `stream`. The stream ends with the event `[DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelCard(_Schema):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vlm"


class ModelList(_Schema):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(_Schema):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Schema):
    error: ErrorDetail


class Health(_Schema):
    status: Literal["ok", "draining", "failed"]
    model: str
    running: int
    waiting: int
