"""Plain completions (`POST /v1/completions`) as OpenAI's API writes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from vlm.apps.api.fields import GenerationRequest, NotNegative, Schema, UpTo20
from vlm.apps.api.schemas import FinishReason, Usage

TokenIds = Annotated[list[NotNegative], Field(min_length=1)]


def _as_prompts(value: Any) -> Any:
    """One prompt is a list of one, so that an error in a list of prompts names the prompt."""
    is_one = isinstance(value, str) or (isinstance(value, list) and value and not isinstance(value[0], str | list))
    return [value] if is_one else value


class TextRequest(GenerationRequest):
    """Body of POST /v1/completions: text that the model goes on with as it is, without a chat template."""

    prompt: Annotated[
        list[str] | list[TokenIds],
        Field(min_length=1),
        BeforeValidator(_as_prompts, json_schema_input_type=str | list[str] | TokenIds | list[TokenIds]),
    ] = Field(description="A text, its token ids, or a list of either. Control words in it count as such.")
    echo: bool | None = Field(None, description="Put the prompt before the reply.")
    logprobs: UpTo20 | None = Field(None, description="Likeliest tokens to report with each token.")

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class TextLogprobs(Schema):
    """Per token of the reply; `text_offset` counts characters of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Schema):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None = None


class TextCompletion(Schema):
    """Answer to POST /v1/completions; with `stream`, each event is one too, and `[DONE]` ends it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
