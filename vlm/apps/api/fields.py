"""What requests of all routes that generate have in common: kinds of numbers, and how a reply is chosen."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

MAX_INT = (1 << 63) - 1


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 5.0 is the integer 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Positive = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
NotNegative = Annotated[int, Field(ge=0, le=MAX_INT), BeforeValidator(_whole)]
AnyWhole = Annotated[int, Field(ge=-MAX_INT, le=MAX_INT), BeforeValidator(_whole)]
TopK = Annotated[int, Field(ge=-1, le=MAX_INT), BeforeValidator(_whole)]
UpTo20 = Annotated[int, Field(ge=0, le=20), BeforeValidator(_whole)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Field(ge=0.1, le=10)]


def _as_list(value: Any) -> Any:
    """A text is a list of one, so that an error in a list names the one that is wrong."""
    return [value] if isinstance(value, str) else value


StopText = Annotated[str, StringConstraints(min_length=1)]


class Schema(BaseModel):
    """Part of an answer."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Sent(BaseModel):
    """Part of a request. Keys that no field takes are kept, so that they can be named: see `unread`."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class StreamOptions(Sent):
    include_usage: bool | None = Field(None, description="Send a last chunk that holds only the usage.")


class GenerationRequest(Sent):
    """What chats and plain completions have in common."""

    model: str = Field(description="The name that /v1/models lists.")
    max_tokens: Positive | None = Field(None, description="Longest reply, in tokens.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest token each time; default 1.")
    top_p: Share | None = Field(None, description="0 takes the likeliest token each time.")
    top_k: TopK | None = Field(None, description="Beyond OpenAI's API. 0, or -1 as vLLM has it, considers all tokens.")
    min_p: Share | None = Field(None, description="Beyond OpenAI's API. Least probability, as a share of the greatest.")
    repetition_penalty: RepetitionPenalty | None = Field(None, description="Beyond OpenAI's API. 1 is none.")
    repeat_penalty: RepetitionPenalty | None = Field(None, description="Another name of repetition_penalty.")
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=1024, description="Token id -> added to its logit."
    )
    seed: AnyWhole | None = Field(None, description="Same seed, same draws.")
    stop: (
        Annotated[list[StopText], BeforeValidator(_as_list, json_schema_input_type=StopText | list[StopText])] | None
    ) = None
    n: Positive | None = Field(None, description="Replies to the same prompt.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_fit(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to report with each token; None reports nothing."""
        raise NotImplementedError

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)
