"""JSON values -> a request, or an error that names the first field that is wrong."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ValidationError

from vlm.apps.api.errors import ApiError
from vlm.apps.api.fields import GenerationRequest
from vlm.apps.api.limits import Limits
from vlm.apps.api.response_schemas import ResponseRequest
from vlm.apps.api.schemas import ChatRequest, ImagePart
from vlm.apps.api.text_schemas import TextRequest
from vlm.apps.api.unread import refuse_unsupported

Request = TypeVar("Request", ChatRequest, TextRequest, ResponseRequest)
_NAMED = 40  # characters of a value that an error quotes


def parse_request(value: Any, kind: type[Request], limits: Limits) -> Request:
    """
    Raises:
        ApiError: 400, naming the first field that is wrong.
    """
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", "invalid_request")
    refuse_unsupported(value, kind.model_fields)
    for name in ("messages", "prompt", "input"):
        if isinstance(value.get(name), list) and len(value[name]) > limits.max_messages and not _is_ids(value[name]):
            raise _too_many(name, len(value[name]), limits.max_messages)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _explained(error, value) from None


def check_limits(request: GenerationRequest, limits: Limits, where: str) -> None:
    """
    Args:
        where: the key that holds the messages or prompts.

    Raises:
        ApiError: 400.
    """
    replies = request.n or 1
    if replies > limits.max_choices:
        raise _too_many("n", replies, limits.max_choices)
    if isinstance(request, TextRequest) and replies * len(request.prompt) > limits.max_choices:
        raise _too_many(where, replies * len(request.prompt), limits.max_choices, "replies (n of each prompt)")
    if len(request.stops) > limits.max_stops:
        raise _too_many("stop", len(request.stops), limits.max_stops)
    if any(len(text) > limits.stop_length for text in request.stops):
        raise ApiError(400, f"a stop text is longer than {limits.stop_length} characters", "invalid_request", "stop")
    if isinstance(request, ChatRequest):
        parts = (part for message in request.messages for part in message.content or ())
        num_images = sum(isinstance(part, ImagePart) for part in parts)
        if num_images > limits.max_images:
            raise _too_many(where, num_images, limits.max_images, "images")


def _is_ids(value: list[Any]) -> bool:
    return isinstance(value[0], int)


def _too_many(param: str, got: int, limit: int, what: str | None = None) -> ApiError:
    return ApiError(400, f"{param}: {got:,} {what or ''}".rstrip() + f", at most {limit:,}", "too_many", param)


def _explained(error: ValidationError, value: dict[str, Any]) -> ApiError:
    """The first problem, in few words: some of pydantic's quote what was sent."""
    first = error.errors(include_input=False, include_url=False)[0]
    place = place_of(first["loc"], value, lacks_last=first["type"] == "missing")
    param = str(first["loc"][0]) if first["loc"] else None
    message = str(first["msg"]).removeprefix("Value error, ")[:200]
    if first["type"] == "union_tag_invalid":
        context = first["ctx"]
        key = "role" if "role" in context["discriminator"] else "type"
        message = f"{key} is '{str(context['tag'])[:_NAMED]}'; known: {context['expected_tags']}"
    elif first["type"] == "list_type" and place.endswith("content"):
        message = "expected a text or a list of parts"
    return ApiError(400, f"{place[:120]}: {message}" if place else message, "invalid_request", param)


def place_of(steps: tuple[int | str, ...], value: Any, lacks_last: bool = False) -> str:
    """Where in what was sent, without the kinds that pydantic puts between.

    Args:
        lacks_last: the last step is a key that is missing.

    >>> place_of(("messages", 0, "user", "content", 1, "image_url", "image_url", "url"),
    ...          {"messages": [{"role": "user", "content": [{"type": "text"}, {"image_url": {"url": 5}}]}]})
    'messages[0].content[1].image_url.url'
    """
    place = ""
    for number, step in enumerate(steps):
        if isinstance(step, int):
            place += f"[{step}]" if isinstance(value, list) else ""
            value = value[step] if isinstance(value, list) and step < len(value) else value
        elif isinstance(value, dict) and (step in value or (lacks_last and number == len(steps) - 1)):
            place += f".{step}" if place else step
            value = value.get(step)
    return place
