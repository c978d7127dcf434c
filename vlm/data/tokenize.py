"""Conversation -> Example, segment by segment: ids and labels in one pass."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from vlm.batch import IGNORE_INDEX, Example, ImageSpec
from vlm.data.conversation import Conversation, ImageSlot, Judged, Preference, Verifiable
from vlm.data.images import image_layout
from vlm.data.template import BOS, EOS, ChatTemplate, Piece, adds_bos, why_no_end
from vlm.errors import ConfigError, RecordError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ConversationTokenizer:
    """Writes conversations as token ids.

    Control pieces of the template are encoded with the tokenizer's special tokens; content with the bare vocabulary,
    so a typed `<|im_start|>` or `<image>` stays text.

    Args:
        tokenizer: a fast tokenizer of transformers.
        template: how turns are written down.
        image_token_id: stands at every image placeholder; None for a model without images.
        tokens_per_image: placeholders per image: a number, or what says it of each image.
        system: for conversations that bring no system turn; None takes the template's default.

    Raises:
        ConfigError: the tokenizer lacks a token that the template ends replies with.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: ChatTemplate,
        *,
        image_token_id: int | None = None,
        tokens_per_image: int | ImageSpec = 0,
        system: str | None = None,
    ) -> None:
        self.template = template
        self.image_token_id = image_token_id
        self.tokens_per_image = tokens_per_image
        self.system = system
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        self._first = _encoder(backend, keep_added_tokens=False, keep_prefix=True)
        self._content = _encoder(backend, keep_added_tokens=False, keep_prefix=False)
        self._control = _encoder(backend, keep_added_tokens=True, keep_prefix=False)
        self._added = frozenset(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
        self._decoder = tokenizer
        self._control_ids: dict[tuple[str, bool], list[int]] = {}
        self._bos = self._bos_ids(tokenizer)
        self._eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.pad_token_id = next(
            (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None and i != image_token_id), 0
        )
        self.stop_ids = self._find_stop_ids(tokenizer)

    def __call__(self, conversation: Conversation) -> Example:
        """Tokenize a whole conversation.

        Raises:
            RecordError: rules no_supervised_tokens (no reply, or only empty ones), empty_reply (some are empty: the
                model would learn to say nothing), image_without_encoder.
        """
        return self.example(conversation, *self.encode(conversation))

    def example(self, conversation: Conversation, ids: list[int], labels: list[int]) -> Example:
        """Of what `encode` returned for the conversation. Raises RecordError as `__call__`."""
        replies = [turn for turn in conversation.turns if turn.role == "assistant" and turn.is_learned]
        empty = [not turn.text.strip() for turn in replies]
        if all(empty) or labels.count(IGNORE_INDEX) == len(labels):
            raise RecordError("no_supervised_tokens", "no reply to learn from", conversation.where)
        if any(empty):
            raise RecordError(
                "empty_reply", f"reply {empty.index(True) + 1} of {len(replies)} is empty", conversation.where
            )
        unread = (*conversation.unread, *self.template.leaves_out(conversation))
        return Example(ids, labels, conversation.images, conversation.where, unread)

    def encode(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Ids and labels, whether or not there is anything to learn."""
        ids, labels = self._encode(self.render(conversation), conversation)
        if labels:
            labels[0] = IGNORE_INDEX  # nothing comes before it that could predict it, in a packed row least of all
        return ids, labels

    def render(self, conversation: Conversation) -> list[Piece | ImageSlot]:
        """What `encode` encodes, in order."""
        return self.template.render(conversation, self.system)

    def encode_piece(self, piece: Piece, is_first: bool) -> list[int]:
        """Ids of a piece, not to be changed.

        Args:
            is_first: nothing but begin tokens stands before it.
        """
        return (self._encode_control if piece.is_control else self._encode_content)(piece.text, is_first)

    def is_begin(self, ids: Iterable[int]) -> bool:
        """Whether there is nothing in `ids` but begin tokens."""
        return all(i in self._bos for i in ids)

    def fit(self, conversation: Conversation, max_length: int, max_images: int, over_long: str) -> Example:
        """Tokenize within a token and an image budget.

        Args:
            over_long: "drop" refuses a longer conversation; "cut" keeps as many whole turns as fit, ending with a
                reply. Images of the turns cut away go with them; image tokens are never cut.

        A preference is never cut: both its branches must fit a row, each whole.

        Raises:
            RecordError: rules over_long, too_many_images, and those of `__call__`.
        """
        if isinstance(conversation, Preference):
            chosen, rejected = (self(branch) for branch in conversation.branches)
            _refuse_over_long(replace(chosen, rejected=rejected), max_length, max_images)
            return replace(chosen, rejected=rejected)
        example = self(conversation)
        if isinstance(conversation, Judged):
            _refuse_over_long(example, max_length, max_images)
            return replace(example, is_good=conversation.is_good)
        if isinstance(conversation, Verifiable):
            _refuse_over_long(example, max_length, max_images)
            return replace(example, answer=conversation.answer)
        if len(example.input_ids) <= max_length and len(example.images) <= max_images:
            return example
        if over_long == "cut":
            ends = [n for n, turn in enumerate(conversation.turns, 1) if turn.role == "assistant"]
            # each reply more is longer, so a few tries find the last that fits, however many turns there are
            num_replies = bisect_left(
                ends, True, key=lambda end: not self._fits(conversation.first_turns(end), max_length, max_images)
            )
            if num_replies:
                return self(conversation.first_turns(ends[num_replies - 1]))
        if len(example.images) > max_images:
            raise RecordError(
                "too_many_images", f"{len(example.images)} images, data.max_images is {max_images}", example.where
            )
        hint = ""
        if self.template.name != "plain" and len(conversation.turns) == 2 and not conversation.turns[0].text.strip():
            hint = "; template plain cuts plain text into rows"
        raise RecordError(
            "over_long", f"{len(example.input_ids)} tokens, data.max_length is {max_length}{hint}", example.where
        )

    def prompt(self, conversation: Conversation) -> list[int]:
        """Token ids up to and with what stands before a reply, for generation.

        Of a reply that the conversation ends with, its text too and not its end: the model goes on with it.
        """
        begun = conversation.begun_reply
        if conversation.turns and conversation.turns[-1].role == "assistant":
            conversation = replace(conversation, turns=conversation.turns[:-1])
        pieces = self.template.render(conversation, self.system, add_generation_prompt=True)
        if begun:
            pieces.append(Piece(self.template.assistant.prefix + begun))
        return self._encode(pieces, conversation)[0]

    def decode(self, ids: list[int]) -> str:
        return str(self._decoder.decode(ids, skip_special_tokens=True))

    def text(self, ids: list[int]) -> str:
        """Text with control tokens shown, for previews."""
        return str(self._decoder.decode(ids))

    @property
    def special_texts(self) -> dict[str, str]:
        """What the template's marks for the begin and end token stand for here."""
        begin = (self._decoder.bos_token or "") if self._bos else ""
        return {BOS: str(begin), EOS: str(self._decoder.eos_token or "")}

    def ends_of_tokens(self, text: str) -> list[int]:
        """One past the last character of each token of a text."""
        return [end for _, end in self._content.encode(text, add_special_tokens=False).offsets]

    def round_trip(self, text: str) -> str:
        """A text encoded as a whole and decoded again: what the tokenizer by itself changes of it."""
        return self.text(self._decoder(text, add_special_tokens=False).input_ids)

    def fingerprint(self) -> dict[str, Any]:
        """All that decides the ids, as JSON."""
        count = self.tokens_per_image
        return {
            "vocabulary": self._control.to_str(),
            "template": repr(self.template),
            "system": self.system,
            "image": [self.image_token_id, count if isinstance(count, int) else count.fingerprint()],
            "special": [self._bos, self._eos],
        }

    def _fits(self, conversation: Conversation, max_length: int, max_images: int) -> bool:
        return len(conversation.images) <= max_images and len(self.encode(conversation)[0]) <= max_length

    def num_tokens(self, image: str | bytes) -> int:
        """Placeholders of an image. Raises RecordError: its header is needed and cannot be read."""
        count = self.tokens_per_image
        return count if isinstance(count, int) else image_layout(image, count).num_tokens

    def num_tiles(self, image: str | bytes) -> int:
        """Squares that the encoder sees of an image."""
        count = self.tokens_per_image
        return 1 if isinstance(count, int) else len(image_layout(image, count).tiles)

    @property
    def reads_images(self) -> bool:
        """Whether the number of placeholders depends on the image."""
        return not isinstance(self.tokens_per_image, int) and self.tokens_per_image.reads_size

    @property
    def typical_tokens(self) -> int:
        """Placeholders of an image as large as a tile, for estimates."""
        count = self.tokens_per_image
        return count if isinstance(count, int) else count.typical().num_tokens

    def _encode(self, pieces: list[Piece | ImageSlot], conversation: Conversation) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        images = iter(conversation.images)
        is_first = True
        for piece in pieces:
            if isinstance(piece, ImageSlot):
                if self.image_token_id is None:
                    raise RecordError("image_without_encoder", "an image, but model.vision is null", conversation.where)
                new = [self.image_token_id] * self.num_tokens(next(images, b""))
            else:
                new = self.encode_piece(piece, is_first)
            is_first = is_first and self.is_begin(new)
            ids += new
            labels += new if isinstance(piece, Piece) and piece.is_reply else [IGNORE_INDEX] * len(new)
        return ids, labels

    def _encode_control(self, text: str, is_first: bool = False) -> list[int]:
        """Kept, as a template has few control texts; the list is not to be changed."""
        if text == BOS:
            return self._bos
        key = text, is_first
        if key not in self._control_ids:
            self._control_ids[key] = self._make_control(text, is_first)
        return self._control_ids[key]

    def _make_control(self, text: str, is_first: bool) -> list[int]:
        before, eos, after = text.partition(EOS)
        ids = self._control.encode(before, add_special_tokens=False).ids
        if is_first and self._added.isdisjoint(ids):  # "USER:" begins the text as any word would
            ids = self._first.encode(before, add_special_tokens=False).ids
        return ids + self._eos + self._control.encode(after, add_special_tokens=False).ids if eos else ids

    def _encode_content(self, text: str, is_first: bool) -> list[int]:
        encoding = (self._first if is_first else self._content).encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if self._added.isdisjoint(ids):
            return ids
        # Unigram models, and BPE that looks whole words up, find a typed control word in the vocabulary itself: cut
        # every such word in two and encode the parts. One of a single character cannot be told from the character.
        cuts = [
            end - 1
            for token, (start, end) in zip(ids, encoding.offsets, strict=True)
            if end - start > 1 and token in self._added
        ]
        if not cuts:
            return ids
        parts = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
        return [i for n, part in enumerate(parts) for i in self._encode_content(part, is_first and n == 0)]

    def _bos_ids(self, tokenizer: PreTrainedTokenizerFast) -> list[int]:
        wanted = self.template.bos == "always" or (self.template.bos == "tokenizer" and adds_bos(tokenizer))
        return [tokenizer.bos_token_id] if wanted and tokenizer.bos_token_id is not None else []

    def _find_stop_ids(self, tokenizer: PreTrainedTokenizerFast) -> set[int]:
        if problem := why_no_end(self.template, bool(self._eos), lambda word: len(self._encode_control(word)) == 1):
            raise ConfigError(problem)
        return (
            set(self._eos)
            if EOS in self.template.stop
            else {*self._encode_control(self.template.stop.strip()), *self._eos}
        )


def _refuse_over_long(example: Example, max_length: int, max_images: int) -> None:
    """Raises RecordError: rules over_long, too_many_images, for all branches together."""
    what = "" if example.rejected is None else " of both replies, each with its question"
    num_images = sum(len(branch.images) for branch in example.branches)
    if num_images > max_images:
        raise RecordError(
            "too_many_images", f"{num_images} images{what}, data.max_images is {max_images}", example.where
        )
    if example.num_tokens > max_length:
        raise RecordError(
            "over_long", f"{example.num_tokens} tokens{what}, data.max_length is {max_length}", example.where
        )


def _encoder(backend: dict[str, Any], *, keep_added_tokens: bool, keep_prefix: bool) -> Tokenizer:
    """A copy of a tokenizer's backend without the steps that would change single segments.

    Without `keep_added_tokens` no special or added token is recognised in the text. Without `keep_prefix` the blank
    that SentencePiece-like tokenizers put before a text is left out: a segment is no new text.
    """
    settings = {**backend, "post_processor": None, "truncation": None, "padding": None}
    if not keep_added_tokens:
        settings["added_tokens"] = []
    if not keep_prefix:
        settings["normalizer"] = _without_prefix(backend.get("normalizer"))
        settings["pre_tokenizer"] = _without_prefix(backend.get("pre_tokenizer"))
    return Tokenizer.from_str(json.dumps(settings))


def _without_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
    if step is None or step["type"] == "Prepend" or _edits_the_start(step):
        return None
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if step["type"] == "ByteLevel":
        return {**step, "add_prefix_space": False}
    if step["type"] == "Sequence":
        key = "normalizers" if "normalizers" in step else "pretokenizers"
        return {**step, key: [kept for kept in map(_without_prefix, step[key]) if kept is not None]}
    return step


def _edits_the_start(step: dict[str, Any]) -> bool:
    """A SentencePiece model's removal of blanks around a text: around a segment they are part of the text."""
    return step["type"] == "Replace" and str(step["pattern"].get("Regex", "")).startswith(r"\A")
