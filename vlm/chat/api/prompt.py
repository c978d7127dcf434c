"""Messages of a request -> what the model reads: token ids and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm.chat.api.errors import ApiError
from vlm.chat.api.limits import Limits
from vlm.chat.api.schemas import ChatRequest, ImagePart, Message
from vlm.data.images import FORMATS, load_image, to_pixels
from vlm.errors import RecordError
from vlm.export.load import LoadedModel
from vlm.export.messages import to_conversation

_LONGEST_TOKEN = 64  # characters a token may stand for on average; long runs of blanks come near it


@dataclass(frozen=True)
class Prompt:
    input_ids: list[int]
    pixel_values: Tensor | None  # [N, 3, S, S]
    max_new_tokens: int


def image_urls(messages: Sequence[Message]) -> list[str]:
    """In the order in which the pictures are shown."""
    return [
        part.image_url.url
        for message in messages
        if isinstance(message.content, list)
        for part in message.content
        if isinstance(part, ImagePart)
    ]


def build_prompt(
    loaded: LoadedModel, request: ChatRequest, pictures: Sequence[bytes], max_tokens: int, limits: Limits
) -> Prompt:
    """
    Args:
        pictures: what `image_urls` name.
        max_tokens: longest prompt and reply together that the server can hold.

    Raises:
        ApiError: 400 an order of turns that no template can write, a picture that cannot be read, or too long.
    """
    if pictures and loaded.image_spec is None:
        raise ApiError(400, "this model reads no pictures", "images_not_supported", "messages")
    longest = min(max_tokens, loaded.max_tokens)
    wanted = request.new_tokens
    if wanted is not None and wanted > longest:
        raise ApiError(400, f"max_tokens is {wanted:,}, at most {longest:,} here", "too_many", "max_tokens")
    messages = _merged(request.messages)
    num_letters = sum(len(part["text"]) for message in messages for part in message["content"] if "text" in part)
    if num_letters > _LONGEST_TOKEN * longest:  # not worth tokenizing
        raise _too_long(f"has {num_letters:,} characters", longest)
    try:
        conversation = to_conversation(messages, pictures)
        if conversation.turns[-1].role != "user":
            raise ApiError(400, "the last message must be the user's", "invalid_request", "messages")
        input_ids = loaded.conversation_tokenizer.prompt(conversation)
    except RecordError as error:  # about turns only: pictures are not opened yet
        raise ApiError(400, f"messages: {error.message}", error.rule, "messages") from None
    if len(input_ids) >= longest:
        raise _too_long(f"has {len(input_ids):,} tokens ({len(pictures)} pictures included)", longest)
    left = longest - len(input_ids)
    new_tokens = min(wanted or limits.default_new_tokens, left)
    return Prompt(input_ids, _pixels(loaded, pictures, limits.max_pixels), new_tokens)


def _merged(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as `to_conversation` takes them: one system message, and users in a row as one."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        parts = _parts(message)
        if role == "system" and not any(part["text"].strip() for part in parts):
            continue
        if merged and merged[-1]["role"] == role and role != "assistant":
            merged[-1]["content"] += [{"type": "text", "text": "\n"}, *parts]
        else:
            merged.append({"role": role, "content": parts})
    if not any(message["role"] == "user" for message in merged):
        raise ApiError(400, "messages: there is no user message", "invalid_request", "messages")
    return merged


def _parts(message: Message) -> list[dict[str, Any]]:
    if isinstance(message.content, list):
        return [
            {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
            for part in message.content
        ]
    return [{"type": "text", "text": message.content}] if message.content else []


def _pixels(loaded: LoadedModel, pictures: Sequence[bytes], max_pixels: int) -> Tensor | None:
    spec = loaded.image_spec
    if not pictures or spec is None:
        return None
    pixels = []
    for number, picture in enumerate(pictures, 1):
        try:
            pixels.append(to_pixels(load_image(picture, max_pixels, spec.background), spec))
        except RecordError as error:  # its text may quote the decoder
            if error.rule == "image_too_large":
                message = f"has more than {max_pixels:,} pixels"
            else:
                message = f"cannot be read: it is damaged, or none of {', '.join(FORMATS)}"
            raise ApiError(400, f"image_url: picture {number} {message}", error.rule, "messages") from None
    return torch.stack(pixels)


def _too_long(what: str, longest: int) -> ApiError:
    message = f"the conversation {what}; this server takes at most {longest:,} tokens, with the reply"
    return ApiError(400, message, "context_length_exceeded", "messages")
