"""Where images stand in a user turn: before the words or after them, in training data and in what clients send.

Clients send the words first (OpenAI's examples, LangChain, Open WebUI); most training data has the images first, and a
model trained on it answers differently when they come last. So an export says which order its data had, and prompts are
brought into it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from vlm.data.conversation import IMAGE, Conversation, Part
from vlm.errors import RecordError

if TYPE_CHECKING:
    import numpy as np

    from vlm.data.scan import ExampleReader

ImageOrder = Literal["first", "last", "keep"]
LEARNED = 0.99  # share of the counted turns above which an order is the one that was learned
MOST_COUNTED = 2_000  # records, evenly spaced; reading each takes 0.1 ms, or 5 ms where images are inside it


def arrange_images(parts: tuple[Part, ...], order: ImageOrder) -> tuple[Part, ...]:
    """The parts of a user turn with its images before or after its words; each keeps its place among its kind.

    Where an image stood between words a line break does, and one stands between images and words.

    >>> arrange_images(("First", IMAGE, "then", IMAGE), "first")
    (ImageSlot(), ImageSlot(), '\\nFirst', '\\nthen')
    >>> arrange_images((IMAGE, "\\nWhat is this?"), "last")
    ('What is this?', '\\n', ImageSlot())
    """
    images = tuple(part for part in parts if part == IMAGE)
    words = tuple(part for part in parts if part != IMAGE and part != "")
    if order == "keep" or not images or not words or (order == "first" and parts == images + words):
        return parts
    if order == "first":
        return (*images, *_words(parts, begins_line=True))
    lines = _words(parts, begins_line=False)
    if parts[0] == IMAGE and len(lines[0]) > 1:  # the line break after an image that now comes later
        lines[0] = lines[0].removeprefix("\n")
    return (*lines, *(() if lines[-1].endswith("\n") else ("\n",)), *images)


def order_of(parts: Sequence[Part]) -> Literal["first", "last", "mixed"] | None:
    """Where the images of a turn stand; None if it has no images, or no words."""
    is_image = [part == IMAGE for part in parts if not isinstance(part, str) or part.strip()]
    if all(is_image) or not any(is_image):
        return None
    if is_image == sorted(is_image, reverse=True):
        return "first"
    return "last" if is_image == sorted(is_image) else "mixed"


def count_image_orders(reader: ExampleReader, numbers: np.ndarray) -> dict[str, int]:
    """Turns of the records `numbers` by where their images stand: "first", "last", "mixed".

    Of more than `MOST_COUNTED` records, evenly spaced ones are counted. Turns whose words the template leaves out do
    not count; neither do records that cannot be read now.
    """
    if reader.tokenizer.template.only_images_of_user:
        return {}
    if len(numbers) > MOST_COUNTED:
        numbers = numbers[[place * len(numbers) // MOST_COUNTED for place in range(MOST_COUNTED)]]
    return dict(Counter(order for one in _conversations(reader, numbers) for order in _orders(one)))


def learned_order(counts: Mapping[str, int]) -> ImageOrder:
    """
    >>> learned_order({"first": 990, "mixed": 5}), learned_order({"first": 6, "last": 4}), learned_order({})
    ('first', 'keep', 'keep')
    """
    total = sum(counts.values())
    orders: tuple[ImageOrder, ...] = ("first", "last")
    return next((order for order in orders if total and counts.get(order, 0) >= LEARNED * total), "keep")


def _words(parts: Sequence[Part], begins_line: bool) -> list[str]:
    """The words, those after an image on a line of their own; the first ones if `begins_line`."""
    words: list[str] = []
    for part in parts:
        if not isinstance(part, str):
            begins_line = begins_line or bool(words)
        elif part:
            gap = "\n" if begins_line and not part.startswith("\n") else ""
            words.append(gap + part)
            begins_line = False
    return words


def _conversations(reader: ExampleReader, numbers: np.ndarray) -> Iterable[Conversation]:
    for number in numbers.tolist():
        source, local = reader.locate(number)
        try:
            yield source.conversation(local)
        except RecordError:  # was readable when it was measured; training skips and lists it
            continue


def _orders(conversation: Conversation) -> Iterable[str]:
    orders = (order_of(turn.parts) for turn in conversation.turns if turn.role == "user")
    return [order for order in orders if order is not None]
