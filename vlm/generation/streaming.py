"""Token ids -> text as it grows: whole characters only, and never past a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoders write for the bytes of an unfinished character
_HELD = 16  # tokens without a whole character that are held back; more are taken as they are
CONTEXT = 4  # tokens of a begun reply that say how its next word is spelled
_CHARACTER = 4  # bytes of the longest character, so it is at most as many tokens


class TextStream:
    """Decodes one reply token by token.

    A Chinese character or an emoji may be two to four tokens: its bytes are held back until it is whole. Text that may
    be the beginning of a stop string is held back until it is not.

    Args:
        decode: token ids -> text, special tokens left out.
        stop: texts that end the reply; the first found, and all after it, is not given out.
        before: the last tokens of a text that the reply goes on with, else the space before its first word is lost.

    >>> letters = TextStream(lambda ids: bytes(ids).decode(errors="replace"))
    >>> [letters.push(byte) for byte in "好!".encode()]
    ['', '', '好', '!']
    """

    def __init__(
        self, decode: Callable[[list[int]], str], stop: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        self._decode = decode
        self._stop = tuple(text for text in stop if text)
        self._ids: list[int] = list(before)
        self._prefix = 0  # decoding starts here: one step back, so that the space before a word is not lost
        self._given = len(before)  # tokens whose text has been given out
        self._held = ""
        self.stopped = False  # a stop string was found

    def push(self, token_id: int) -> str:
        """The text that is certain now, often empty."""
        if self.stopped:
            return ""
        self._ids.append(token_id)
        end = len(self._ids)
        text = self._new_text(end)
        if not text or text.endswith(_INCOMPLETE):
            if end - self._given <= _HELD:
                return ""
            if not text:  # tokens without text, e.g. marks of images, are not kept: each push decodes all that are
                self._ids.pop()
                return ""
            end -= _CHARACTER - 1  # these may be the beginning of a character
            text = self._new_text(end)
        self._prefix, self._given = self._given, end
        return self._release(text)

    def finish(self) -> str:
        """What is still held back, without the bytes of a character that was cut off by the length limit."""
        if self.stopped:
            return ""
        text = self._release(self._new_text(len(self._ids)).rstrip(_INCOMPLETE))
        rest, self._held = self._held, ""
        self._prefix = self._given = len(self._ids)
        return text + rest

    def _new_text(self, end: int) -> str:
        before = self._decode(self._ids[self._prefix : self._given])
        return self._decode(self._ids[self._prefix : end])[len(before) :]

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`.

    >>> _overlap("one two\\nUS", "\\nUSER:")
    3
    """
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
