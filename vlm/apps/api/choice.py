"""Tokens of one reply -> the pieces of text that a client gets, with log-probabilities if they were asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from vlm.apps.api.errors import ApiError
from vlm.apps.api.schemas import Logprobs, TokenLogprob, TopLogprob
from vlm.generation.batched import EndReason
from vlm.generation.sampling import NewToken
from vlm.generation.streaming import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Piece:
    """Some text of choice `index`."""

    index: int
    text: str
    logprobs: Logprobs | None


@dataclass(frozen=True)
class End:
    """Choice `index` is complete: `reason`, or what its request is answered with instead."""

    index: int
    num_tokens: int
    reason: Literal["stop", "length"] | ApiError


Event = Piece | End


class ChoiceWriter:
    """Turns the tokens of a reply into events. Called by the thread that generates.

    Log-probabilities go out with the text of their token, also where only its beginning is sent because a stop text
    begins within it. Those of tokens that are nothing but part of a stop text do not.

    Args:
        before: the last tokens of a text that the reply goes on with.
        post: takes the events, in order; the last is an `End`.
        explain: what a client is told of an exception.
    """

    def __init__(
        self,
        index: int,
        decode: Callable[[list[int]], str],
        stop: Sequence[str],
        spell: TokenSpeller | None,
        post: Callable[[Event], None],
        explain: Callable[[Exception], ApiError],
        before: Sequence[int] = (),
    ) -> None:
        self._index = index
        self._text = TextStream(decode, stop, before)
        self._spell = spell
        self._post = post
        self._explain = explain
        self._held: list[NewToken] = []
        self._num_tokens = 0

    def on_token(self, token: NewToken) -> bool:
        """False when a stop text is complete."""
        self._num_tokens += 1
        self._held.append(token)
        self._send(self._text.push(token.id))
        return not self._text.stopped

    def on_end(self, reason: EndReason | Exception) -> None:
        if isinstance(reason, Exception):
            self._post(End(self._index, self._num_tokens, self._explain(reason)))
            return
        if reason != "cancelled":
            was_stopped = self._text.stopped
            self._send(self._text.finish(), even_empty=not was_stopped)
            reason = "stop" if self._text.stopped else reason  # found in the last characters
        self._post(End(self._index, self._num_tokens, "stop" if reason == "cancelled" else reason))

    def _send(self, text: str, even_empty: bool = False) -> None:
        if not text and not (even_empty and self._spell is not None and self._held):
            return
        logprobs = None if self._spell is None else Logprobs(content=[self._spell(token) for token in self._held])
        self._held.clear()
        self._post(Piece(self._index, text, logprobs))


class TokenSpeller:
    """Writes log-probabilities as OpenAI does: each token as text and as bytes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, decode: Callable[[list[int]], str]) -> None:
        self._tokenizer: Any = tokenizer
        self._decode = decode
        # a word before the token: at the start of a text, tokenizers like SentencePiece drop a blank
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]

    def __call__(self, token: NewToken) -> TokenLogprob:
        assert token.logprob is not None
        return TokenLogprob(
            token=self._text(token.id),
            logprob=_finite(token.logprob),
            bytes=self._bytes(token.id),
            top_logprobs=[
                TopLogprob(token=self._text(i), logprob=_finite(value), bytes=self._bytes(i))
                for i, value in token.likeliest
            ],
        )

    def _text(self, token_id: int) -> str:
        before, text = self._decode(self._before), self._decode([*self._before, token_id])
        text = text[len(before) :] if before and text.startswith(before) else self._decode([token_id])
        return text or str(self._tokenizer.convert_ids_to_tokens(token_id) or "")

    def _bytes(self, token_id: int) -> list[int] | None:
        """None where they cannot be told: a part of a character in a tokenizer that does not spell bytes."""
        text = self._text(token_id)
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return list(text.encode())
        letters = str(self._tokenizer.convert_ids_to_tokens(token_id) or "")
        if letters.startswith("<0x") and letters.endswith(">"):  # SentencePiece
            return [int(letters[3:-1], 16)]
        spelled = [_byte_letters().get(letter) for letter in letters]
        return [byte for byte in spelled if byte is not None] if None not in spelled else None


@cache
def _byte_letters() -> dict[str, int]:
    """The letters that stand for bytes in a byte-level vocabulary (GPT-2's): printable ones for themselves, the others
    moved up behind 255.

    >>> _byte_letters()["Ġ"]
    32
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no infinity
