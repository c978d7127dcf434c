"""Plain text for pretraining: documents that are longer than a row are cut into pieces, each an example of its own.

A piece ends where a line or else a word does. Pieces of one document do not see each other, and only the last one has
the token that ends a text. A record's first piece keeps the record's number; the others are numbered after all records.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from vlm.batch import Example
from vlm.data.conversation import Conversation
from vlm.data.tokenize import ConversationTokenizer

PIECE_COLUMNS = 5  # of the table: number of the record, first character, tokens, supervised tokens, place in the store
_CHARACTERS_PER_TOKEN = 4  # of a text's first piece; then as the piece before had
_MARGIN = 16  # tokens; that many before its cut, a text's tokens are those of the longer text
_LEAST_SHARE = 0.75  # of a piece that is kept when it is shortened to the end of a line or word


def _no_pieces() -> np.ndarray:
    return np.zeros((0, PIECE_COLUMNS), dtype=np.int64)


@dataclass(frozen=True)
class Pieces:
    """The pieces after the first of every record that was cut; int64 [m, PIECE_COLUMNS], in the order of the text."""

    table: np.ndarray = field(default_factory=_no_pieces)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def num_cut(self) -> int:
        """Records that were cut."""
        return len(np.unique(self.table[:, 0]))

    def span(self, number: int, num_records: int) -> tuple[int, int, int | None] | None:
        """(record, first character, one past the last or None at its end) of a piece; None: a record that is whole."""
        record = number if number < num_records else int(self.table[number - num_records, 0])
        first, stop = np.searchsorted(self.table[:, 0], [record, record + 1])
        if first == stop:
            return None
        place = int(first) - 1 if number < num_records else number - num_records
        start = 0 if place < first else int(self.table[place, 1])
        return record, start, int(self.table[place + 1, 1]) if place + 1 < stop else None

    def of(self, records: np.ndarray, num_records: int) -> np.ndarray:
        """The numbers of records, int64 [n], and after them those of the pieces of these records."""
        return np.concatenate([records, num_records + np.flatnonzero(np.isin(self.table[:, 0], records))])


def may_cut(conversation: Conversation, tokenizer: ConversationTokenizer) -> bool:
    """Whether it is a text with nothing before it, written by the template plain: so is its continuation."""
    *before, last = conversation.turns
    return (
        tokenizer.template.only_images_of_user
        and last.role == "assistant"
        and not conversation.images
        and not any(turn.text.strip() for turn in before)
    )


def cut_document(
    conversation: Conversation, tokenizer: ConversationTokenizer, max_length: int
) -> list[tuple[int, Example]]:
    """A text as pieces of at most `max_length` tokens: the first character of each, and the piece. One for a text that
    fits, none for one that says nothing.

    A piece is as long as fits, then shortened to the end of a line, else of a word, if one lies in its last quarter.

    Raises:
        RecordError: not even one character fits, or a piece says nothing; see `ConversationTokenizer.fit`.
    """
    text, pieces, start = conversation.turns[-1].text.rstrip(), [], 0
    expected = _CHARACTERS_PER_TOKEN * max_length  # characters of a full piece
    while start < len(text):
        stop, piece = _next_piece(conversation, text, start, expected, tokenizer, max_length)
        pieces.append((start, piece))
        start, expected = stop, (stop - start) * max_length // len(piece.input_ids)
    return pieces


def piece_of(conversation: Conversation, start: int, stop: int | None) -> Conversation:
    """The characters from `start` to before `stop` of a text; None is its end, white space left out."""
    *before, last = conversation.turns
    text = last.text.rstrip()[start:stop]
    return conversation.with_turns((*before, last.with_text(text)), goes_on=stop is not None)


def _next_piece(
    conversation: Conversation, text: str, start: int, expected: int, tokenizer: ConversationTokenizer, max_length: int
) -> tuple[int, Example]:
    """Where the piece that begins at `start` ends, and the piece."""

    def piece_to(stop: int) -> Conversation:
        return piece_of(conversation, start, None if stop == len(text) else stop)

    if len(text) - start <= expected:  # as of most texts, and of a long one's end
        piece = piece_to(len(text))
        encoded = tokenizer.encode(piece)
        if len(encoded[0]) <= max_length - _MARGIN:
            return len(text), tokenizer.example(piece, *encoded)
    for stop in _guesses(text, start, expected, tokenizer, max_length):
        piece = piece_to(stop)
        encoded = tokenizer.encode(piece)
        if len(encoded[0]) <= max_length:
            return stop, tokenizer.example(piece, *encoded)
    # not even one character fits: `fit` says so of this record
    return start + 1, tokenizer.fit(piece_to(start + 1), max_length, 0, "drop")


def _guesses(text: str, start: int, expected: int, tokenizer: ConversationTokenizer, max_length: int) -> Iterator[int]:
    """Where a piece may end, the farthest first: tokens at a cut differ from those of the whole text."""
    width = expected * 5 // 4 + _MARGIN
    ends = tokenizer.ends_of_tokens(text[start : start + width])
    while len(ends) < max_length + _MARGIN and start + width < len(text):
        width *= 2
        ends = tokenizer.ends_of_tokens(text[start : start + width])
    if len(ends) <= max_length:
        yield len(text)
    room = min(max_length, len(ends))
    while room > 0:
        yield _end_of_line_or_word(text, start, start + max(1, ends[room - 1]))
        room = room - 2 if room > max_length - 8 else room * 7 // 8


def _end_of_line_or_word(text: str, start: int, stop: int) -> int:
    least = start + int(_LEAST_SHARE * (stop - start)) + 1
    if stop >= len(text) or stop <= least:
        return stop
    line, word = text.rfind("\n", least, stop), text.rfind(" ", least, stop)
    return line + 1 if line >= 0 else word if word >= 0 else stop  # a blank belongs to the word after it
