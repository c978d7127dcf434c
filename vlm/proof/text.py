"""Checks of what the model is given: ids, labels, positions and images of the first records. No model is run."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Callable, Iterator
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from vlm.batch import IGNORE_INDEX, Batch, ImageSpec
from vlm.data.conversation import ImageSlot
from vlm.data.images import fit_square, load_image
from vlm.data.tokenize import ConversationTokenizer
from vlm.models.vision import VisionEncoder
from vlm.proof.checks import Finding, at_most, holds, not_made
from vlm.proof.records import Record, Subject

IMAGE_TEXT = "<image>"
LOSSY_TEXT = 0.1  # see `_difference`; a tokenizer that gives text back as it is must be right to the letter
WINDOW = 2000  # characters of a long record that are compared where it differs
PIXEL_BOUND = 2e-3  # of normalised pixels; worst seen 2.4e-7. A mean of another encoder is 0.1 off.


def check_text(subject: Subject, tokens: ConversationTokenizer, system: str | None) -> dict[str, Finding]:
    """Args: system: the config's data.system, from which the text is rendered once more."""
    records = subject.read
    return {
        "labels": _first_problem(records, lambda record: _labels_problem(record, tokens)),
        "end_token": _first_problem(records, lambda record: _end_problem(record, tokens)),
        "text": _text(records, tokens, system),
    }


def check_batches(subject: Subject, tokens: ConversationTokenizer, num_tokens: int | None) -> dict[str, Finding]:
    """
    Args:
        num_tokens: features per tile, as the projector says; None without images.
    """
    records = subject.computed
    batch = subject.batch([records, records[:1]])
    return {
        "placeholders": _placeholders(subject.read, tokens, num_tokens),
        "positions": holds(_positions_problem(batch, records)),
        "padding": holds(_padding_problem(batch, records)),
    }


def check_pixels(batch: Batch, records: list[Record], spec: ImageSpec, vision: VisionEncoder) -> Finding:
    """Compare the batch of `records` with the images made anew from their files.

    Args:
        vision: says how each encoder was trained to see an image, which `spec` should say too.
    """
    assert batch.pixel_values is not None
    expected = fresh_pixels(records, spec, vision)
    if expected.shape != batch.pixel_values.shape:
        return holds(f"{len(batch.pixel_values)} images in the batch, {len(expected)} in its records")
    return at_most((batch.pixel_values.cpu().float() - expected).abs().max().item(), PIXEL_BOUND)


def fresh_pixels(records: list[Record], spec: ImageSpec, vision: VisionEncoder) -> Tensor:
    """[N, 3, S, S] float32 of all tiles of the records' images, in order; of several encoders three channels each."""
    pixels = []
    for record in records:
        for image in record.conversation.images:
            opened = load_image(image, background=spec.background)
            for box in spec.layout(*opened.size).tiles:
                tile, seen = opened.crop(box), torch.zeros_like(vision.blank_image()[0], device="cpu").float()
                for number, (member, want) in enumerate(zip(spec.members, vision.members, strict=True)):
                    square = torch.tensor(np.asarray(fit_square(tile, member), dtype=np.float32)) / 255
                    place = seen[3 * number : 3 * number + 3, : want.image_size, : want.image_size]
                    place.copy_(((square - torch.tensor(want.mean)) / torch.tensor(want.std)).permute(2, 0, 1))
                pixels.append(seen)
    return torch.stack(pixels)


def _first_problem(records: list[Record], problem_of: Callable[[Record], str]) -> Finding:
    for record in records:
        problem = problem_of(record)
        if problem:
            return holds(f"{record.example.where}: {problem}")
    return holds("")


def _labels_problem(record: Record, tokens: ConversationTokenizer) -> str:
    ids, labels = record.example.input_ids, record.example.labels
    if len(ids) != len(labels):
        return f"{len(ids)} tokens, {len(labels)} labels"
    moved = [n for n, label in enumerate(labels) if label != IGNORE_INDEX and label != ids[n]]
    if moved:
        return f"the label of token {moved[0]} is another token"
    said = "".join(tokens.text(run) for run in _labelled_runs(record))
    replies = "".join(reply + tokens.template.stop for reply in _replies(record))
    replies = replies.removesuffix(tokens.template.stop) if record.conversation.goes_on else replies
    expected = _with_specials(replies, tokens)
    # a record's very first token is predicted by nothing, so it has no label even in a reply
    is_cut = _first_label(record) == 1 and _plain(expected).endswith(_plain(said))
    if not is_cut and _difference(said, expected, tokens):
        return f"the labels say {said[:80]!r}, the replies and their ends are {expected[:80]!r}"
    return ""


def _end_problem(record: Record, tokens: ConversationTokenizer) -> str:
    runs = _labelled_runs(record)
    goes_on = record.conversation.goes_on
    if goes_on and runs[-1][-1] in tokens.stop_ids:
        return "a piece of a longer text ends as a reply does"
    for run in runs[: len(runs) - goes_on]:
        if run[-1] not in tokens.stop_ids:
            return f"the last label of a reply is {tokens.text(run[-1:])!r}, at which generation goes on"
    ends = sum(label in tokens.stop_ids for run in runs for label in run)
    replies = len(_replies(record)) - goes_on
    return f"{replies} replies, {ends} labels that end one" if ends < replies else ""


def _text(records: list[Record], tokens: ConversationTokenizer, system: str | None) -> Finding:
    worst, where = 0.0, ""
    for record in records:
        text, found = _rendered(record, tokens, system), _decoded(record, tokens)
        difference = _difference(found, text, tokens)
        if difference > worst:
            worst, where = difference, f"{record.example.where}: {found[:80]!r} instead of {text[:80]!r}"
    return at_most(worst, 0.0, where)


def _placeholders(records: list[Record], tokens: ConversationTokenizer, num_tokens: int | None) -> Finding:
    if num_tokens is None:
        return not_made("the model reads no images")
    for record in records:
        count = record.example.input_ids.count(tokens.image_token_id)  # type: ignore[arg-type]
        images = record.conversation.images
        num_tiles = sum(map(tokens.num_tiles, images))
        if count != num_tokens * num_tiles:
            return holds(f"{record.example.where}: {count} placeholders, {len(images)} images of {num_tokens} features")
    return holds("") if any(record.example.images for record in records) else not_made("no image in the first records")


def _positions_problem(batch: Batch, records: list[Record]) -> str:
    expected = torch.zeros_like(batch.position_ids)
    for row, start, record in _places(records):
        length = len(record.example.input_ids)
        expected[row, start : start + length] = torch.arange(length)
    wrong = (batch.position_ids != expected).nonzero()
    if not len(wrong):
        return ""
    row, token = wrong[0].tolist()
    return f"row {row}, token {token}: position {batch.position_ids[row, token]}, expected {expected[row, token]}"


def _padding_problem(batch: Batch, records: list[Record]) -> str:
    rest = torch.ones_like(batch.labels, dtype=torch.bool)
    for row, start, record in _places(records):
        example = record.example
        part = slice(start, start + len(example.input_ids))
        if batch.input_ids[row, part].tolist() != example.input_ids:
            return f"{example.where}: the batch holds other tokens"
        if batch.labels[row, part].tolist() != example.labels:
            return f"{example.where}: the batch holds other labels"
        rest[row, part] = False
    count = int((batch.labels[rest] != IGNORE_INDEX).sum())
    return f"{count} padding tokens have labels" if count else ""


def _places(records: list[Record]) -> Iterator[tuple[int, int, Record]]:
    """(row, first token, record) of a batch whose first row holds all records and whose second the first one."""
    start = 0
    for record in records:
        yield 0, start, record
        start += len(record.example.input_ids)
    yield 1, 0, records[0]


def _labelled_runs(record: Record) -> list[list[int]]:
    labels = record.example.labels
    return [list(run) for is_labelled, run in groupby(labels, lambda label: label != IGNORE_INDEX) if is_labelled]


def _replies(record: Record) -> list[str]:
    return [turn.text for turn in record.conversation.turns if turn.role == "assistant" and turn.is_learned]


def _first_label(record: Record) -> int:
    return next(place for place, label in enumerate(record.example.labels) if label != IGNORE_INDEX)


def _rendered(record: Record, tokens: ConversationTokenizer, system: str | None) -> str:
    pieces = tokens.template.render(record.conversation, system)
    text = "".join(IMAGE_TEXT if isinstance(piece, ImageSlot) else piece.text for piece in pieces)
    return _with_specials(text, tokens)


def _with_specials(text: str, tokens: ConversationTokenizer) -> str:
    for mark, written in tokens.special_texts.items():
        text = text.replace(mark, written)
    return text


def _decoded(record: Record, tokens: ConversationTokenizer) -> str:
    """The ids as text, the placeholders of each image as one mark."""
    image = tokens.image_token_id
    counts = map(tokens.num_tokens, record.example.images)
    parts = []
    for is_image, run in groupby(record.example.input_ids, lambda token: image is not None and token == image):
        ids = list(run)
        parts.append(IMAGE_TEXT * _num_images(len(ids), counts) if is_image else tokens.text(ids))
    return "".join(parts)


def _num_images(num_placeholders: int, counts: Iterator[int]) -> int:
    """Images of a run of placeholders, by what each of them takes."""
    found = 0
    while num_placeholders > 0:
        num_placeholders -= max(1, next(counts, 1))
        found += 1
    return found


def _plain(text: str) -> str:
    """Without blanks, which SentencePiece-like tokenizers move about, and with one form of each character."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def _difference(found: str, expected: str, tokens: ConversationTokenizer) -> float:
    """Share of both texts that is not in the other, 0 to 1.

    A tokenizer that does not give `expected` back as it is (words it does not know, letters it changes) is compared
    with what it gives back of the whole, and may differ a little. Of long texts a window is compared.
    """
    if _plain(found) == _plain(expected):
        return 0.0
    given = _plain(tokens.round_trip(expected))
    near, near_given = _windows(_plain(found), given)
    difference = 1 - difflib.SequenceMatcher(None, near, near_given, autojunk=False).ratio()
    return 0.0 if given != _plain(expected) and difference <= LOSSY_TEXT else difference


def _windows(one: str, other: str) -> tuple[str, str]:
    """At most `WINDOW` characters of each, the first difference in the middle: comparing takes the square of them."""
    pairs = enumerate(zip(one, other, strict=False))
    first = next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
    start = max(0, first - WINDOW // 2)
    return one[start : start + WINDOW], other[start : start + WINDOW]
