"""How often the images of training records stand before the words of their turn, after them, or among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from vlm.data.conversation import Conversation
from vlm.data.image_order import order_of
from vlm.data.scan import ExampleReader
from vlm.errors import RecordError

MOST_COUNTED = 2_000  # records, evenly spaced; reading each takes 0.1 ms, or 5 ms where images are inside it


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
