"""What a caller says -> Conversation: a plain string, or messages as OpenAI's API writes them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.data.conversation import (
    IMAGE,
    Conversation,
    Part,
    Role,
    Turn,
    check_conversation,
    check_images,
    normalise_turns,
)
from vlm.data.records import decode_data_url
from vlm.data.template import ChatTemplate
from vlm.errors import RecordError

ImageInput = str | Path | bytes | Image.Image
Messages = str | Sequence[dict[str, Any]]
_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}


def to_conversation(
    messages: Messages, images: ImageInput | Sequence[ImageInput] = (), template: ChatTemplate | None = None
) -> Conversation:
    """Messages and images as turns.

    Args:
        messages: one question, or a list of `{"role": .., "content": ..}`. Content is text, or a list of parts:
            `{"type": "text", "text": ..}`, `{"type": "image"}` (shows the next of `images`),
            `{"type": "image", "image": path or PIL image}`, `{"type": "image_url", "image_url": {"url": ..}}` with a
            path or a `data:` URL.
        images: paths, encoded bytes or PIL images, or one of them. Those that no part asks for come first in the
            first user turn.
        template: lets turns stand in any order that it can write, and users in a row be one; None allows those only
            that are trained on. A reply at the end is gone on with.

    Raises:
        RecordError: rules bad_message, unknown_role, remote_image, turn_order, and those of `check_conversation`.

    >>> to_conversation("What is this?", ["cat.png"]).turns[0].parts
    (ImageSlot(), '\\nWhat is this?')
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if isinstance(images, (str, Path, bytes, Image.Image)):
        images = [images]
    waiting = [_encoded(image) for image in images]
    shown: list[str | bytes] = []
    turns: list[Turn] = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or "content" not in message:
            raise RecordError("bad_message", f"message {number} is {message!r}; expected role and content")
        role = _ROLES.get(message.get("role", ""))
        if role is None:
            raise RecordError("unknown_role", f"message {number}: role {message.get('role')!r}; known: {list(_ROLES)}")
        turns.append(Turn(role, _parts(message["content"], waiting, shown, f"message {number}")))
    for number, turn in enumerate(turns):
        if waiting and turn.role == "user":
            turns[number] = show_images(turn, len(waiting))
            before = sum(earlier.num_images for earlier in turns[:number])
            shown[before:before] = waiting
            waiting = []
    shown += waiting  # no user turn could take them: the count below says so
    conversation = Conversation(tuple(turns), tuple(shown), "messages")
    return check_conversation(conversation) if template is None else check_prompt(conversation, template)


def check_prompt(conversation: Conversation, template: ChatTemplate) -> Conversation:
    """The conversation with users in a row as one turn, if the template can write it. Raises as `to_conversation`."""
    turns = normalise_turns(conversation.turns)
    if not turns:
        raise RecordError("empty_conversation", "no turn says anything", conversation.where)
    if problem := template.why_not(turns):
        raise RecordError("turn_order", problem, conversation.where)
    return check_images(replace(conversation, turns=turns))


def show_images(turn: Turn, count: int) -> Turn:
    """The turn with `count` images before its text, as training data has them."""
    gap: tuple[Part, ...] = ()
    parts = turn.parts
    if count and parts and isinstance(parts[0], str) and not parts[0].startswith("\n"):
        gap, parts = (f"\n{parts[0]}",), parts[1:]
    return Turn(turn.role, (*([IMAGE] * count), *gap, *parts))


def _parts(content: Any, waiting: list[str | bytes], shown: list[str | bytes], where: str) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (content,) if content else ()
    if not isinstance(content, Sequence):
        raise RecordError("bad_message", f"{where}: content is a {type(content).__name__}; expected text or parts")
    parts: list[Part] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            # an image and the words after it stand on lines of their own, as in training data
            gap = "\n" if parts and parts[-1] == IMAGE and not part["text"].startswith("\n") else ""
            parts.append(gap + part["text"])
        elif kind in ("image", "image_url"):
            parts.append(IMAGE)
            shown.append(_image_of(part, kind, waiting, where))
        else:
            raise RecordError("bad_message", f"{where}: part of type {kind!r}; known: text, image, image_url")
    return tuple(part for part in parts if part != "")


def _image_of(part: dict[str, Any], kind: str, waiting: list[str | bytes], where: str) -> str | bytes:
    source = part.get(kind)
    if isinstance(source, dict):
        source = source.get("url")
    if source is not None:
        return _encoded(source)
    if not waiting:
        raise RecordError("image_count", f"{where}: shows one more image than `images` holds")
    return waiting.pop(0)


def _encoded(image: Any) -> str | bytes:
    """A path as text; an image in memory as PNG bytes, which lose nothing."""
    if isinstance(image, Image.Image):
        stream = io.BytesIO()
        image.save(stream, format="PNG")
        return stream.getvalue()
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str | Path):
        raise RecordError("bad_message", f"an image is a {type(image).__name__}; expected a path or a PIL image")
    text = str(image)
    if text.startswith("data:"):
        return decode_data_url(text)
    if "://" in text:
        raise RecordError("remote_image", f"{text[:80]!r}: images are read from disk, nothing is fetched")
    return text
