"""Where images stand in a user turn: before the words or after them, in training data and in what clients send.

Clients send the words first (OpenAI's examples, LangChain, Open WebUI); most training data has the images first, and a
model trained on it answers differently when they come last. So an export says which order its data had, and prompts are
brought into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from vlm.data.conversation import IMAGE, Part

ImageOrder = Literal["first", "last", "keep"]
LEARNED = 0.99  # share of the counted turns above which an order is the one that was learned


def arrange_images(parts: tuple[Part, ...], order: ImageOrder) -> tuple[Part, ...]:
    """The parts of a user turn with its images before or after its words; each keeps its place among its kind.

    Where an image stood between words a line break does, and one stands between images and words.

    >>> arrange_images(("First", IMAGE, "then", IMAGE), "first")
    (ImageSlot(), ImageSlot(), '\\nFirst', '\\nthen')
    >>> arrange_images((IMAGE, "\\nWhat is this?"), "last")
    ('What is this?', '\\n', ImageSlot())
    """
    if order == "keep":
        return parts
    images = tuple(part for part in parts if part == IMAGE)
    words = tuple(part for part in parts if part != IMAGE and part != "")
    if not images or not words or (order == "first" and parts == images + words):
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
