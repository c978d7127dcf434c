"""Which marks of a record's turns are the places of its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vlm.data.conversation import IMAGE, ImageSlot, Role, Turn, join_texts
from vlm.data.marks import IMAGE_MARK, Mark
from vlm.data.media import Image, embedded_medium, named_medium, read_image
from vlm.errors import RecordError


@dataclass(frozen=True)
class Shown:
    """A part of a turn that is an image: of its own, or one of the record's, the next or the one of that index."""

    image: Image | None = None
    index: int | None = None


class RawTurn(NamedTuple):
    """A turn as it was read, its marks not yet decided on."""

    role: Role
    pieces: tuple[str | Mark | Shown, ...]
    images: tuple[Image, ...] = ()  # named in the turn, beside its text
    is_learned: bool = True


@dataclass
class Placed:
    """Turns with their slots, and the images in the order of these."""

    turns: list[Turn]
    images: list[Image]
    unread: list[str] = field(default_factory=list)  # marks that were left as words though they may be more


def place_images(turns: Sequence[RawTurn], images: list[Image], placement: str) -> Placed:
    """Give every image of a record its place.

    `<image>` is a place wherever the user writes it. Without any, the marks of another tool are, if there are as many
    as images; numbers in them (`<|image_2|>`) and the indexes of parts say which image. Marks in replies and system
    turns are words.

    Args:
        images: those named beside the turns.
        placement: "auto" puts the one image of a turn that has no mark before its text.

    Raises:
        RecordError: rules foreign_mark (marks that fit no image, so that they would be learned as words),
            unread_medium (of a video or sound), image_in_answer, image_count, bad_image_field.
    """
    placed = Placed([], [])
    has_images = bool(images) or any(turn.images or _has_own(turn) for turn in turns)
    turns = [turn if turn.role == "user" else _as_words(turn, has_images, placed) for turn in turns]
    turns = [_with_own_images(turn, placement) if turn.images else turn for turn in turns]
    marks = [piece for turn in turns for piece in turn.pieces if isinstance(piece, Mark)]
    waiting = sum(_is_waiting(piece) for turn in turns for piece in turn.pieces)
    places = _choose(marks, len(images) - waiting, placed)
    shown: list[Shown] = []
    for turn in turns:
        parts: list[str | ImageSlot] = []
        for piece in turn.pieces:
            if isinstance(piece, Mark):
                piece = places.get(id(piece), piece.text)
            if isinstance(piece, Shown):
                shown.append(piece)
            parts.append(IMAGE if isinstance(piece, Shown) else piece)
        placed.turns.append(Turn(turn.role, join_texts(parts), turn.is_learned))
    placed.images = _ordered(shown, images)
    return placed


def _has_own(turn: RawTurn) -> bool:
    return any(isinstance(piece, Shown) or (isinstance(piece, Mark) and piece.path) for piece in turn.pieces)


def _is_waiting(piece: str | Mark | Shown) -> bool:
    """A part that shows one of the images named beside the turns."""
    return isinstance(piece, Shown) and piece.image is None


def _as_words(turn: RawTurn, has_images: bool, placed: Placed) -> RawTurn:
    """A reply or system turn, where marks are words: an error where images are about, as they would be learned."""
    if not turn.images and all(isinstance(piece, str) for piece in turn.pieces):
        return turn
    for piece in turn.pieces:
        if isinstance(piece, Shown) or (has_images and isinstance(piece, Mark) and piece.strength == "ours"):
            raise RecordError("image_in_answer", "an <image> mark or an image stands in a system or assistant turn")
        if isinstance(piece, Mark) and piece.strength == "sure":
            if has_images:
                raise RecordError("foreign_mark", f"{piece.text[:40]!r} stands in a system or assistant turn")
            placed.unread.append(f"the word {piece.text[:60]}")
    if turn.images:
        raise RecordError("image_in_answer", "an image stands in a system or assistant turn")
    pieces = tuple(piece.text if isinstance(piece, Mark) else piece for piece in turn.pieces)
    return RawTurn(turn.role, ("".join(piece for piece in pieces if isinstance(piece, str)),), (), turn.is_learned)


def _with_own_images(turn: RawTurn, placement: str) -> RawTurn:
    """A user's turn that names its images beside its text: they belong to its marks."""
    marks = [piece for piece in turn.pieces if isinstance(piece, Mark)]
    waiting = [piece for piece in turn.pieces if _is_waiting(piece)]
    places = {} if waiting else _choose(marks, len(turn.images), Placed([], []))
    if not places and not waiting and len(turn.images) == 1 and placement != "exact":
        return RawTurn(turn.role, (Shown(turn.images[0]), "\n", *turn.pieces), (), turn.is_learned)
    count = len(waiting) + len(places)
    if count != len(turn.images):
        raise RecordError("image_count", f"a turn with {count} <image> marks and {len(turn.images)} images")
    pieces: list[str | Mark | Shown] = []
    images = iter(turn.images)
    for piece in turn.pieces:
        is_place = _is_waiting(piece) or (isinstance(piece, Mark) and id(piece) in places)
        index = places[id(piece)].index if isinstance(piece, Mark) and is_place else None
        pieces.append(Shown(next(images) if index is None else turn.images[index]) if is_place else piece)
    return RawTurn(turn.role, tuple(pieces), (), turn.is_learned)


def _choose(marks: list[Mark], num_images: int, placed: Placed) -> dict[int, Shown]:
    """What the marks that are places show, by the `id` of each mark. The others stay words."""
    places: dict[int, Shown] = {}
    foreign = []
    for mark in marks:
        if mark.medium != "image":
            _refuse_other_medium(mark, placed)
        elif mark.strength == "ours":
            places[id(mark)] = Shown()
        elif mark.path is not None:
            places[id(mark)] = Shown(read_image(mark.path))
        else:
            foreign.append(mark)
    if places or num_images <= 0:
        for mark in foreign:
            if mark.strength == "sure" or (mark.stands_apart and not places):
                raise RecordError("foreign_mark", _surplus(mark, bool(places)))
            placed.unread.append(f"the word {mark.text[:60]}")
        return places
    chosen = [mark for mark in foreign if mark.is_place]
    if len(chosen) != num_images and foreign:
        named = ", ".join(mark.text[:30] for mark in foreign[:3])
        raise RecordError(
            "foreign_mark", f"{len(foreign)} marks ({named}), {num_images} images. Write {IMAGE_MARK} where each goes"
        )
    return {id(mark): Shown(index=index) for mark, index in zip(chosen, _indexes(chosen), strict=True)}


def _surplus(mark: Mark, has_places: bool) -> str:
    what = "beside the places of all images" if has_places else "and no image for it"
    return f"{mark.text[:40]!r}, the mark of an image, {what}. It would be learned as words"


def _refuse_other_medium(mark: Mark, placed: Placed) -> None:
    if mark.strength in ("sure", "variant") or mark.stands_apart:
        raise RecordError("unread_medium", f"{mark.text[:60]!r} stands for {_WHAT[mark.medium]}, which is not read")
    placed.unread.append(f"the word {mark.text[:60]}")


_WHAT = {"video": "a video", "audio": "a sound"}


def _indexes(marks: list[Mark]) -> list[int | None]:
    """Which image each mark shows, by its number, from 0 or 1; None for the next one."""
    numbers = [mark.number for mark in marks if mark.number is not None]
    if not numbers:
        return [None] * len(marks)
    first = min(1, min(numbers))
    if len(numbers) != len(marks) or sorted(numbers) != list(range(first, first + len(marks))):
        raise RecordError(
            "foreign_mark", f"marks numbered {numbers[:8]} for {len(marks)} images; expected each number once"
        )
    return [number - first for number in numbers]


def _ordered(shown: list[Shown], images: list[Image]) -> list[Image]:
    """The images in the order in which they are shown."""
    inline = [piece.image for piece in shown if piece.image is not None]
    if inline:
        if images and images != inline:
            raise RecordError(
                "bad_image_field", "images are named both in turns and beside them; their order is unclear"
            )
        return inline
    indexes = [piece.index for piece in shown if piece.index is not None]
    if not indexes:
        return images
    if len(indexes) != len(shown):
        raise RecordError("bad_image_field", "some parts have an index and some have none; their order is unclear")
    if sorted(set(indexes)) != list(range(len(images))):
        raise RecordError("bad_image_field", f"parts show images {indexes[:8]}, and there are {len(images)}, from 0")
    return [images[index] for index in indexes]


def media_in_texts(turns: Sequence[RawTurn]) -> list[str]:
    """What of the users' texts shows a medium in the way of Markdown or HTML: a page, or an image that is not read.

    Raises:
        RecordError: rule unread_medium, if a file is written out within a text, or if a text begins with one that is
            shown.
    """
    shown: list[str] = []
    for turn in turns:
        for piece in turn.pieces:
            if isinstance(piece, str) and (found := embedded_medium(piece)):
                raise RecordError("unread_medium", f"{found!r} within the text of a turn is not read as an image")
            if isinstance(piece, str) and turn.role == "user" and (found := named_medium(piece)):
                if piece is turn.pieces[0] and piece.lstrip().startswith(found):
                    raise RecordError("unread_medium", f"{found[:80]!r} begins a turn and is not read as an image")
                shown.append("media shown in Markdown or HTML")
    return shown
