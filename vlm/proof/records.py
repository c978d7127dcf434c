"""The first records of a run that its proof looks at, and the batches made of them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlm.batch import IGNORE_INDEX, Batch, Example
from vlm.data.build import Data
from vlm.data.collate import Collator
from vlm.data.conversation import Conversation, Preference
from vlm.data.scan import Scan
from vlm.errors import DataError

FIRST_ROWS = 64  # rows of the first epoch that the records are taken from
NUM_SHORT = 16  # the shortest of them, among which two are chosen that the model computes
NUM_COMPUTED = 2
NUM_FIRST = 14  # the very first, whose text is compared too
TEXT_TOKENS = 6  # a record with less text is computed only if there is no other


@dataclass(frozen=True)
class Record:
    conversation: Conversation  # of a preference, the one with the preferred reply
    example: Example  # what training makes of it
    trained: Example  # as a step has it: of a preference with both replies
    rejected: Record | None = None  # of a preference: the other reply


@dataclass(frozen=True)
class Subject:
    """The records of a proof: two short ones that the model computes, and the first ones of the run."""

    computed: list[Record]  # with images where there are any
    read: list[Record]  # all
    collator: Collator

    def batch(self, rows: list[list[Record]]) -> Batch:
        """As training makes it, but no longer than its records.

        Raises:
            DataError: an image of them cannot be read.
        """
        return self._collate(rows, replace(self.collator, pad_to=None, image_token_id=None))

    def steps(self, rows: list[list[Record]], shares: bool) -> Batch:
        """As `batch`, with all replies that the objective reads.

        Args:
            shares: whether replies share their question, where training lets them.
        """
        collate = replace(self.collator, pad_to=None, image_token_id=None)
        collate = collate if shares else replace(collate, shares_questions=False)
        return self._collate(rows, collate, trained=True)

    def shared(self, record: Record) -> Batch | None:
        """A row of one record twice, the second time without the tokens that it begins with; None where none may be
        left out."""
        batch = self._collate([[record, record]], replace(self.collator, pad_to=None))
        return batch if int((batch.position_ids == 0).sum()) - batch.num_padding == 1 else None

    def _collate(self, rows: list[list[Record]], collate: Collator, trained: bool = False) -> Batch:
        batch = collate([[record.trained if trained else record.example for record in row] for row in rows])
        if batch.skipped:
            raise DataError(f"{batch.skipped[0].where}: {batch.skipped[0].message}")
        return batch


def choose(data: Data) -> tuple[list[int], list[int]]:
    """Numbers of the records to compute, and of others to read. Raises DataError if none can be read."""
    rows = data.train.order
    packed = rows.rows(0)
    first = np.asarray(packed.numbers[: packed.ends[:FIRST_ROWS][-1]])
    lengths, num_images = rows.scan.lengths[first], rows.scan.num_images[first]
    is_terse = lengths - num_images * rows.scan.reader.tokenizer.typical_tokens < TEXT_TOKENS
    order = np.lexsort((np.arange(len(first)), lengths, is_terse, num_images == 0))  # the last key counts first
    short = _readable(data, first[order], NUM_SHORT, with_images=True)
    if not short:
        raise DataError("none of the first records can be read; `vlm data check CONFIG` says why")
    image_token_id = rows.scan.reader.tokenizer.image_token_id
    number = next(
        (number for number, example in short.items() if reads_image(example, image_token_id)), next(iter(short))
    )
    example = short.pop(number)
    others = sorted(short.items(), key=lambda entry: _likeness(example, entry[1]))
    computed = [number, *(other for other, _ in others)][:NUM_COMPUTED]
    return computed, [number for number in _readable(data, first, NUM_FIRST) if number not in computed]


def _readable(data: Data, numbers: np.ndarray, count: int, with_images: bool = False) -> dict[int, Example]:
    """The first `count` of some records that can be read, with their images. Training skips and names the others."""
    found: dict[int, Example] = {}
    for number in dict.fromkeys(numbers.tolist()):
        if len(found) == count:
            break
        with suppress(DataError):
            record = read_record(data.train.order.scan, number)
            if with_images:
                Subject([record], [], data.train.collator).batch([[record]])
            found[number] = record.example
    return found


def reads_image(example: Example, image_token_id: int | None) -> bool:
    """Whether an image stands before a label, so that what is learned depends on it."""
    if image_token_id not in example.input_ids:
        return False
    return any(label != IGNORE_INDEX for label in example.labels[example.input_ids.index(image_token_id) :])


def read_record(scan: Scan, number: int) -> Record:
    """Raises RecordError."""
    trained = scan.read(number)
    conversation = scan.reader.conversation(number)
    if isinstance(conversation, Preference):
        chosen, rejected = (
            _record(branch, example, trained)
            for branch, example in zip(conversation.branches, trained.branches, strict=True)
        )
        return replace(chosen, rejected=rejected)
    return _record(_as_far_as(conversation, scan), trained, trained)


def _record(conversation: Conversation, example: Example, trained: Example) -> Record:
    return Record(conversation, replace(example, is_good=None, reference=(), answer=None), trained)


def _as_far_as(conversation: Conversation, scan: Scan) -> Conversation:
    """The turns that training kept of a record that is too long: up to the last reply that fits."""
    reader = scan.reader
    ends = [count for count, turn in enumerate(conversation.turns, 1) if turn.role == "assistant"]
    for count in [len(conversation.turns), *reversed(ends)]:
        turns = conversation.first_turns(count)
        if len(turns.images) <= reader.max_images and len(reader.tokenizer.encode(turns)[0]) <= reader.max_length:
            return turns
    return conversation


def _likeness(first: Example, other: Example) -> tuple[bool, bool, bool]:
    """The second record should have images like the first, but other ones, and another number of labels."""
    return (
        len(first.images) != len(other.images),
        first.images == other.images,
        first.num_supervised == other.num_supervised,
    )


def other_images(batch: Batch, count: int) -> Batch:
    """The batch with noise for its first `count` images: of pixels, or of features by channel."""
    pixels, features = batch.pixel_values, batch.image_features
    if pixels is not None:
        pixels = torch.cat([_noise(pixels[:count].shape).to(pixels), pixels[count:]])
    if features is not None:
        std, mean = torch.std_mean(features.float(), dim=(0, 1))
        noise = _noise(features[:count].shape).to(std) * std + mean
        features = torch.cat([noise.to(features.dtype), features[count:]])
    return replace(batch, pixel_values=pixels, image_features=features)


def images_moved(batch: Batch, count: int) -> Batch:
    """The first `count` images after all others."""

    def moved(values: Tensor | None) -> Tensor | None:
        """[N, ...] -> [N, ...], the first `count` after all others; None stays None."""
        return None if values is None else values.roll(-count, 0)

    return replace(batch, pixel_values=moved(batch.pixel_values), image_features=moved(batch.image_features))


def _noise(shape: torch.Size) -> Tensor:
    """Normal noise of any shape [...], float32 on the CPU, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
