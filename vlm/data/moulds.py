"""What is found of one record holds for those of its mould: they differ from it in plain words and names alone.

Understanding a record takes several times as long as encoding its words, and most records of a file are alike. So a
record is first taken apart: its keys, roles, blanks and marks are its mould, the rest its words, names of images and
ids. One of a mould is understood with other words in place of its own (`vlm.data.parse`, `ConversationTokenizer`), and
where these come out says where every record's go. A record with anything that could be read in another way than as
words has no mould and is understood by itself.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Hashable
from typing import Any, NamedTuple

from vlm.data.config import TURN_NAMES
from vlm.data.conversation import Conversation, ImageSlot
from vlm.data.documents import may_cut
from vlm.data.examples import Kept, Runs
from vlm.data.marks import IMAGE_MARK
from vlm.data.parse import ANSWER_KEYS, BESIDE_KEYS, CHAT_KEYS, QUESTION_KEYS, SYSTEM_KEYS
from vlm.data.records import RecordSource
from vlm.data.template import Piece
from vlm.data.tokenize import ConversationTokenizer
from vlm.data.unread import LABEL_KEYS, PREFERENCE_KEYS, REPLY_KEYS, WEIGHT_KEYS
from vlm.errors import RecordError

_TEXTS = frozenset({"caption", "text", *QUESTION_KEYS, *ANSWER_KEYS, *BESIDE_KEYS, *SYSTEM_KEYS})
_IMAGES = frozenset({"image", "images"})
_TURNS = frozenset(CHAT_KEYS)
# whose values decide what is learned, or how the record is read, in any spelling
_DECIDE = frozenset(
    {*LABEL_KEYS, *PREFERENCE_KEYS, *REPLY_KEYS, *WEIGHT_KEYS, "prompt", "completion", "history", "file_name"}
)
# may begin a mark, show a medium, hold one, or be half of a character
_NO_WORDS = re.compile(r"<|\[[/A-Za-z]|\{\{?[A-Za-z]|!\[|data:|[\ud800-\udfff]")
_NAME = re.compile(r"[\w./ -]{0,400}[\w-]\.[A-Za-z0-9]{2,5}")  # no link and no base64
_ID = re.compile(r"[A-Za-z0-9_-]{1,40}|-?\d{1,20}\.\d{1,20}")  # says nothing, whatever its key
_BEFORE, _AFTER = f"{IMAGE_MARK}\n", f"\n{IMAGE_MARK}"  # as most write the places of images
_SIGN = "\ue000"  # begins what stands for a text while a mould is made
_WORD = re.compile(f"{_SIGN}(\\d+)\ue001")
_MOST_MOULDS = 1000  # that one of these looks for
_MOST_KEPT, _LONGEST_KEPT = 5000, 500  # questions whose ids are kept, and their letters


class Apart(NamedTuple):
    """A record taken apart."""

    mould: tuple[Hashable, ...]
    texts: list[str]
    names: list[str]  # of its images


class _Step(NamedTuple):
    """What a mould writes next: placeholders, or a text of the record's, or ids that are the same in all records."""

    num_placeholders: int = 0
    parts: tuple[str | int, ...] = ()  # of a text; a number is that of the record's
    ids: array[int] = array("i")  # not to be changed
    is_first: bool = False  # see `ConversationTokenizer.encode_piece`
    is_learned: bool = False


class _Mould(NamedTuple):
    steps: list[_Step]
    num_images: int
    unread: tuple[str, ...]


class Moulds:
    """Those of one source, as far as these records show them: made for every chunk of a scan.

    Args:
        max_length, max_images: of an example; a longer one is left to `ConversationTokenizer.fit`.
    """

    def __init__(self, source: RecordSource, tokenizer: ConversationTokenizer, max_length: int, max_images: int):
        config = source.config
        self._source = source
        self._tokenizer = tokenizer
        self._limits = max_length, max_images
        self._ours = {theirs: ours for ours, theirs in config.columns.items()}
        fixed = f"{config.prompt} {tokenizer.system} {tokenizer.template.default_system}"
        self._can_cast = (
            source.reads == "conversation"
            and not tokenizer.reads_images  # placeholders depend on the image
            and config.format != "marked_turns"  # a text is cut into turns
            and not {*TURN_NAMES} & {*config.columns}
            and _SIGN not in fixed
        )
        self._moulds: dict[tuple[Hashable, ...], _Mould | None] = {}
        self._seen_once: set[tuple[Hashable, ...]] = set()
        self._question_ids: dict[tuple[str, bool], list[int]] = {}

    def cast(self, number: int, record: dict[str, Any]) -> Kept | None:
        """Record `number` of the source, if another had its mould before; None: it must be understood, or refused.

        Raises:
            RecordError: an image of it is not found.
        """
        apart = take_apart(record, self._ours) if self._can_cast else None
        if apart is None:
            return None
        mould = self._mould_of(number, record, apart)
        runs = None if mould is None else self._write(mould, apart.texts)
        if mould is None or runs is None:
            return None
        try:
            images = self._source.find_images(apart.names, "") if apart.names else ()
        except RecordError as error:
            raise error.at(self._source.where(number)) from None
        return Kept(runs, images, tuple(apart.names), mould.unread)

    def _mould_of(self, number: int, record: dict[str, Any], apart: Apart) -> _Mould | None:
        key = apart.mould
        if key in self._moulds:
            return self._moulds[key]
        if key not in self._seen_once:  # making one takes as long as understanding a few records
            if len(self._seen_once) < _MOST_MOULDS:
                self._seen_once.add(key)
            return None
        self._moulds[key] = mould = self._make(number, record, apart)
        return mould

    def _make(self, number: int, record: dict[str, Any], apart: Apart) -> _Mould | None:
        """None where what its texts say or how many they are decides what is read of them."""
        words = Apart(
            apart.mould,
            [f"{_SIGN}{place}\ue001" for place in range(len(apart.texts))],
            [f"image-{place}.png" for place in range(len(apart.names))],
        )
        other = _replaced(record, self._ours, words)
        if take_apart(other, self._ours) != words:  # the two would not agree on what is a text
            return None
        try:
            conversation = self._source.parse(number, other)
        except RecordError:
            return None
        turns = conversation.turns
        said = [int(text) for turn in turns for text in _WORD.findall(turn.text)]
        if (
            type(conversation) is not Conversation
            or conversation.images != tuple(words.names)
            or sorted(said) != list(range(len(apart.texts)))  # each text is said exactly once
            or any(turn.role == "assistant" and not turn.text.strip() for turn in turns)  # an empty reply is refused
            or may_cut(conversation, self._tokenizer)
        ):
            return None
        steps = self._steps_of(self._tokenizer.render(conversation))
        unread = (*conversation.unread, *self._tokenizer.template.leaves_out(conversation))
        return None if steps is None else _Mould(steps, len(conversation.images), unread)

    def _steps_of(self, pieces: list[Piece | ImageSlot]) -> list[_Step] | None:
        steps: list[_Step] = []
        is_first = True
        for piece in pieces:
            if isinstance(piece, ImageSlot):
                count = self._tokenizer.num_tokens("")
                if self._tokenizer.image_token_id is None or not count:
                    return None
                steps.append(_Step(num_placeholders=count))
                is_first = False
                continue
            first, *rest = _WORD.split(piece.text)
            if rest:  # words and what stands between them, in turns
                parts = [first, *(int(part) if place % 2 == 0 else part for place, part in enumerate(rest))]
                given = tuple(part for part in parts if part != "")
                steps.append(_Step(parts=given, is_first=is_first, is_learned=piece.is_reply))
                is_first = False
                continue
            ids = self._tokenizer.encode_piece(piece, is_first)
            is_first = is_first and self._tokenizer.is_begin(ids)
            if steps and steps[-1].ids and steps[-1].is_learned == piece.is_reply:
                steps[-1] = steps[-1]._replace(ids=steps[-1].ids + array("i", ids))
            elif ids:
                steps.append(_Step(ids=array("i", ids), is_learned=piece.is_reply))
        has_others = any(self._tokenizer.image_token_id in step.ids for step in steps)  # placeholders of no image
        learns_first = not steps or steps[0].is_learned  # the first token has no label
        return None if has_others or learns_first else steps

    def _write(self, mould: _Mould, texts: list[str]) -> Runs | None:
        """None if it is too long, nothing is learned, or a text is encoded to what a text is not."""
        placeholder = self._tokenizer.image_token_id
        kept = array("i")
        images: list[int] = []
        learned: list[int] = []
        length = 0
        for count, parts, ids, is_first, is_learned in mould.steps:
            if count:
                _extend(images, length, length + count)
                length += count
                continue
            if parts:
                encoded = self._encode(parts, texts, is_first, is_learned)
                if placeholder in encoded or (is_first and self._tokenizer.is_begin(encoded)):
                    return None
                kept.extend(encoded)
                count = len(encoded)
            else:
                kept += ids
                count = len(ids)
            if is_learned and count:
                _extend(learned, length, length + count)
            length += count
        max_length, max_images = self._limits
        fits = learned and length <= max_length and mould.num_images <= max_images
        return Runs(kept, images, learned, length) if fits else None

    def _encode(self, parts: tuple[str | int, ...], texts: list[str], is_first: bool, is_learned: bool) -> list[int]:
        text = "".join([texts[part] if isinstance(part, int) else part for part in parts])
        if is_learned or len(text) > _LONGEST_KEPT:  # a question may be that of many
            return self._tokenizer.encode_piece(Piece(text), is_first)
        key = text, is_first
        if key not in self._question_ids:
            if len(self._question_ids) >= _MOST_KEPT:
                self._question_ids.clear()
            self._question_ids[key] = self._tokenizer.encode_piece(Piece(text), is_first)
        return self._question_ids[key]


def take_apart(record: dict[str, Any], ours: dict[str, str]) -> Apart | None:
    """None for a record whose values may be read in another way than as words.

    Args:
        ours: another name of a key -> the one that is read.

    >>> take_apart({"id": "7", "image": "a.png", "caption": "A dog."}, {})
    Apart(mould=('id', 'id', 'image', 'name', 'caption', ('', '')), texts=['A dog.'], names=['a.png'])
    >>> take_apart({"image": "a.png", "caption": "A dog <image>."}, {}) is None
    True
    """
    mould: list[Hashable] = []
    texts: list[str] = []
    names: list[str] = []
    for key, value in record.items():
        name = ours.get(key, key) if ours else key
        if name.lower() in _DECIDE:
            return None
        found: Hashable
        if value is None or value == "":
            found = f"{value}"
        elif name in _TURNS and type(value) is list:
            found = _take_turns(value, texts)
        elif name in _TEXTS and type(value) is str:
            found = _take_text(value, texts)
        elif name in _IMAGES and type(value) in (str, list):
            found = _take_names(value, names)
        else:
            found = _take_id(value)
        if found is None:
            return None
        mould += key, found
    return Apart(tuple(mould), texts, names)


def _take_turns(turns: list[Any], texts: list[str]) -> tuple[Hashable, ...] | None:
    """Turns of a role and a text each."""
    found: list[Hashable] = []
    for turn in turns:
        if type(turn) is not dict or len(turn) != 2:
            return None
        role, text = turn.get("from"), turn.get("value")
        if role is None:
            role, text = turn.get("role"), turn.get("content")
        if type(role) is not str or type(text) is not str:
            return None
        marks = _take_text(text, texts)
        if marks is None:
            return None
        found += (*turn, role, marks)
    return tuple(found)


def _take_text(text: str, texts: list[str]) -> tuple[str, str] | None:
    """The marks of images before it and behind it; None if it is more than plain words."""
    before, text, after = _split_marks(text)
    if not text or text.strip() != text or _NO_WORDS.search(text):
        return None
    texts.append(text)
    return before, after


def _split_marks(text: str) -> tuple[str, str, str]:
    before = after = 0
    while text.startswith(_BEFORE, before * len(_BEFORE)):
        before += 1
    end = len(text)
    while text.endswith(_AFTER, before * len(_BEFORE), end):
        end -= len(_AFTER)
        after += 1
    return _BEFORE * before, text[before * len(_BEFORE) : end], _AFTER * after


def _take_names(value: str | list[Any], names: list[str]) -> int | str | None:
    """How many images are named, and whether in a list; None if one is no plain name of a file."""
    given = [value] if isinstance(value, str) else value
    if not all(type(name) is str and _NAME.fullmatch(name) for name in given):
        return None
    names += given
    return len(given) if isinstance(value, list) else "name"


def _take_id(value: Any) -> str | None:
    """What kind of value it is, if it says nothing by itself."""
    kind = type(value)
    if kind is str:
        return "id" if _ID.fullmatch(value) else None
    return kind.__name__ if kind in (int, float, bool) else None


def _replaced(record: dict[str, Any], ours: dict[str, str], words: Apart) -> dict[str, Any]:
    """A record that could be taken apart, with the texts and names of `words` in place of its own."""
    texts, names = iter(words.texts), iter(words.names)

    def text(value: str) -> str:
        before, _, after = _split_marks(value)
        return before + next(texts) + after

    def replace(name: str, value: Any) -> Any:
        if name in _TURNS and type(value) is list:
            return [{**turn, key: text(turn[key])} for turn in value for key in turn if key in ("value", "content")]
        if name in _TEXTS and value and type(value) is str:
            return text(value)
        if name in _IMAGES and value and type(value) in (str, list):
            return next(names) if type(value) is str else [next(names) for _ in value]
        return value

    return {key: replace(ours.get(key, key), value) for key, value in record.items()}


def _extend(runs: list[int], start: int, end: int) -> None:
    if runs and runs[-1] == start:
        runs[-1] = end
    else:
        runs += start, end
