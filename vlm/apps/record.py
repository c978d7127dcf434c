"""A conversation as a training record: what `vlm data check` accepts and `data.sources` trains on."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from vlm.apps.session import Exchange, Image
from vlm.data.conversation import Turn
from vlm.data.marks import without_marks
from vlm.errors import RecordError
from vlm.inference.messages import show_images

_SIGNATURES = (
    (b"\x89PNG", "png"),
    (b"\xff\xd8", "jpeg"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II", "tiff"),
    (b"MM", "tiff"),
    (b"RIFF", "webp"),
)


class Talk(Protocol):
    """What a record is made from; a `ChatSession` is one."""

    system: str | None
    exchanges: list[Exchange]


def training_record(session: Talk) -> dict[str, Any]:
    """The conversation in OpenAI's form, complete in itself: images are in it as `data:` URLs.

    Read back by `vlm.data.parse.parse_record`, it is the conversation that the model saw. One thing differs: a typed
    `<image>`, or the like, is written `< image>`, since in training data the former is the place of an image. Empty
    replies are marked as not to be learned.

    Raises:
        RecordError: nothing was said yet (rule empty_conversation), or an image is gone (image_missing).

    >>> class Said:
    ...     system = "Be brief."
    ...     exchanges = [Exchange("Hello", (), "Hi.")]
    >>> [message["role"] for message in training_record(Said())["messages"]]
    ['system', 'user', 'assistant']
    """
    if not session.exchanges:
        raise RecordError("empty_conversation", "nothing was said yet, so there is nothing to save")
    messages: list[dict[str, Any]] = []
    if session.system:
        messages.append({"role": "system", "content": without_marks(session.system)})
    for exchange in session.exchanges:
        messages.append({"role": "user", "content": _parts(exchange.question, exchange.images)})
        reply: dict[str, Any] = {"role": "assistant", "content": without_marks(exchange.reply)}
        messages.append(reply if exchange.reply.strip() else {**reply, "loss": False})
    return {"messages": messages}


def record_line(session: Talk) -> str:
    """The record as one line of a .jsonl file, line end included. Raises RecordError as `training_record`."""
    return json.dumps(training_record(session), ensure_ascii=False) + "\n"


def _parts(question: str, images: Sequence[Image]) -> list[dict[str, Any]]:
    turn = show_images(Turn("user", (question,) if question else ()), len(images))
    shown = iter(images)
    return [
        {"type": "text", "text": without_marks(part)}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": _data_url(next(shown))}}
        for part in turn.parts
    ]


def _data_url(image: Image) -> str:
    if isinstance(image, str):
        path = Path(image)
        try:
            image = path.read_bytes()
        except OSError as error:
            raise RecordError("image_missing", f"{path.name} cannot be read ({error.strerror})") from None
    kind = next((name for signature, name in _SIGNATURES if image.startswith(signature)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
