"""A conversation: turns of text and image slots, and the images that fill the slots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from vlm.errors import RecordError

Role = Literal["system", "user", "assistant"]
_ROLES = get_args(Role)


@dataclass(frozen=True)
class ImageSlot:
    """The place of one image in a turn."""


IMAGE = ImageSlot()
Part = str | ImageSlot


@dataclass(frozen=True)
class Turn:
    role: Role
    parts: tuple[Part, ...]
    is_learned: bool = True  # false: a reply that is read, not learned

    @property
    def text(self) -> str:
        """The turn as one string, images left out."""
        if len(self.parts) == 1 and isinstance(self.parts[0], str):
            return self.parts[0]
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def num_images(self) -> int:
        return sum([isinstance(part, ImageSlot) for part in self.parts])

    def with_text(self, text: str) -> Turn:
        """The same turn with other words and no images."""
        return replace(self, parts=(text,))


@dataclass(frozen=True)
class Conversation:
    """Turns in order. The n-th image slot, through all turns, shows `images[n]`: a file path or encoded bytes."""

    turns: tuple[Turn, ...]
    images: tuple[str | bytes, ...] = ()
    where: str = ""  # file and record, for errors
    unread: tuple[str, ...] = field(default=(), compare=False)  # keys and marks of its record that nothing read
    goes_on: bool = False  # its last reply is a piece of a longer text: nothing says that it ends

    @property
    def num_slots(self) -> int:
        return sum(turn.num_images for turn in self.turns)

    @property
    def begun_reply(self) -> str:
        """Text of a reply that the conversation ends with, for the model to go on with; empty when it says nothing."""
        text = self.turns[-1].text if self.turns and self.turns[-1].role == "assistant" else ""
        return text if text.strip() else ""

    def with_turns(self, turns: tuple[Turn, ...], goes_on: bool) -> Conversation:
        """The same record with other turns, which show the same images."""
        return replace(self, turns=turns, goes_on=goes_on)

    def first_turns(self, count: int) -> Conversation:
        """The conversation cut after `count` turns, with the images of those turns only."""
        turns = self.turns[:count]
        return replace(self, turns=turns, images=self.images[: sum(turn.num_images for turn in turns)])


@dataclass(frozen=True)
class Preference(Conversation):
    """Two replies to be compared. `turns` end with the preferred one, `rejected` with the other; what precedes it, the
    images included, is the same in both. Only the replies in which they differ are learned."""

    rejected: tuple[Turn, ...] = ()

    @property
    def branches(self) -> tuple[Conversation, Conversation]:
        """The two as conversations of their own, the preferred one first."""
        chosen, rejected = (
            Conversation(turns, self.images, self.where, self.unread) for turns in (self.turns, self.rejected)
        )
        return chosen, rejected


@dataclass(frozen=True)
class Judged(Conversation):
    """A conversation whose last reply was judged by itself."""

    is_good: bool = True


@dataclass(frozen=True)
class Verifiable(Conversation):
    """A question whose replies the model writes itself, to be compared with an answer. `turns` end with the answer."""

    answer: str = ""


def join_texts(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Texts that follow each other as one: what is written together is encoded together.

    >>> join_texts(("a", "b", IMAGE, "", "c"))
    ('ab', ImageSlot(), 'c')
    """
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return tuple(joined)


def normalise_turns(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Mend what can only have been meant in one way: an empty system turn is left out, users in a row become one.

    Two replies in a row stay: whether the second continues or replaces the first cannot be known.

    >>> normalise_turns((Turn("user", ("Look.",)), Turn("user", ("What is it?",))))
    (Turn(role='user', parts=('Look.', '\\n', 'What is it?'), is_learned=True),)
    """
    normal: list[Turn] = []
    for turn in turns:
        if turn.role == "system" and not turn.num_images and not turn.text.strip():
            continue
        if turn.role == "user" and normal and normal[-1].role == "user":
            normal[-1] = Turn("user", (*normal[-1].parts, "\n", *turn.parts))
        else:
            normal.append(turn)
    return tuple(normal)


def check_conversation(conversation: Conversation) -> Conversation:
    """Return the conversation if it can be trained on.

    The order is: at most one system turn, first; then user and assistant in turns, the user first. A last user turn
    without an answer is allowed: it is read, not learned.

    Raises:
        RecordError: rules empty_conversation, unknown_role, system_not_first, assistant_first, role_repeated,
            image_in_answer, image_count.
    """
    where, turns = conversation.where, conversation.turns
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    first_number = 1 + len(turns) - len(spoken)
    if not spoken:
        raise RecordError("empty_conversation", "no user or assistant turn", where)
    expected: Role = "user"
    for number, turn in enumerate(spoken, first_number):
        if turn.role not in _ROLES:
            raise RecordError("unknown_role", f"turn {number}: role {turn.role!r}, expected {_ROLES}", where)
        if turn.role == "system":
            raise RecordError("system_not_first", f"turn {number} is a system turn; it may only come first", where)
        if turn.role != expected:
            rule = "assistant_first" if number == first_number else "role_repeated"
            raise RecordError(rule, f"turn {number} is {turn.role}, expected {expected}", where)
        expected = "assistant" if turn.role == "user" else "user"
    return check_images(conversation)


def check_images(conversation: Conversation) -> Conversation:
    """Return the conversation if its images can be shown. Raises RecordError: rules image_in_answer, image_count."""
    where = conversation.where
    if any(turn.num_images for turn in conversation.turns if turn.role != "user"):
        raise RecordError("image_in_answer", "an image stands in a system or assistant turn", where)
    if conversation.num_slots != len(conversation.images):
        raise RecordError(
            "image_count",
            f"{conversation.num_slots} <image> marks, {len(conversation.images)} images: each image needs one mark",
            where,
        )
    return conversation
