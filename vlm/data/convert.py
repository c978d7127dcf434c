"""A conversation as a record of the layouts that other programs read."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

from vlm.data.config import SourceConfig
from vlm.data.conversation import Conversation, ImageSlot, Turn
from vlm.data.marks import IMAGE_MARK
from vlm.data.parse import parse_record
from vlm.errors import RecordError

_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}
_MEDIA_TYPES = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}


def convert_conversation(conversation: Conversation, target: str, record_id: Any = None) -> dict[str, Any]:
    """A record of `target` that reads back as the same turns and images.

    Args:
        record_id: the `id` of the record that it was read from, kept if it is text or a number.

    Raises:
        RecordError: rules image_in_record (llava and sharegpt name images by file), reply_not_learned (they have no way
            to say so), unlike_when_read (words would be read as an image's place).
    """
    kept = {"id": record_id} if isinstance(record_id, str | int) else {}
    record = kept | TARGETS[target](conversation)
    try:
        again = parse_record(record, SourceConfig(path=target), "exact")
    except RecordError as error:
        raise RecordError("unlike_when_read", f"as {target} it would be refused: {error.message}") from None
    if (again.turns, again.images) != (conversation.turns, conversation.images):
        raise RecordError("unlike_when_read", f"as {target} it would be read as other turns or images")
    return record


def _llava(conversation: Conversation) -> dict[str, Any]:
    images = _image_files(conversation)
    named: dict[str, Any] = {"image": images[0] if len(images) == 1 else images} if images else {}
    return named | {"conversations": _spoken(conversation)}


def _sharegpt(conversation: Conversation) -> dict[str, Any]:
    images = _image_files(conversation)
    return {"conversations": _spoken(conversation)} | ({"images": images} if images else {})


def _openai(conversation: Conversation) -> dict[str, Any]:
    """Text alone is a string, as all readers take it; a reply that is not learned has weight 0, as OpenAI writes it."""
    images, messages = iter(conversation.images), list[dict[str, Any]]()
    for turn in conversation.turns:
        content: Any = turn.text
        if turn.num_images:
            content = [
                {"type": "image_url", "image_url": {"url": _url(next(images))}}
                if isinstance(part, ImageSlot)
                else {"type": "text", "text": part}
                for part in turn.parts
            ]
        message = {"role": turn.role, "content": content}
        messages.append(message if turn.is_learned else message | {"weight": 0})
    return {"messages": messages}


TARGETS: dict[str, Callable[[Conversation], dict[str, Any]]] = {
    "llava": _llava,
    "openai": _openai,
    "sharegpt": _sharegpt,
}


def _spoken(conversation: Conversation) -> list[dict[str, str]]:
    if not all(turn.is_learned for turn in conversation.turns):
        raise RecordError("reply_not_learned", "a reply that is read and not learned; --to openai can say so")
    return [{"from": _SPEAKERS[turn.role], "value": _marked(turn)} for turn in conversation.turns]


def _marked(turn: Turn) -> str:
    return "".join(IMAGE_MARK if isinstance(part, ImageSlot) else part for part in turn.parts)


def _image_files(conversation: Conversation) -> list[str]:
    names = [image for image in conversation.images if isinstance(image, str)]
    if len(names) < len(conversation.images):
        raise RecordError("image_in_record", "the record holds an image, where a file is named; --to openai keeps it")
    return names


def _url(image: str | bytes) -> str:
    if isinstance(image, str):
        return image
    kind = next((name for magic, name in _MEDIA_TYPES.items() if image.startswith(magic)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
