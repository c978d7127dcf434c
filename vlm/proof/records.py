"""The first records of a run that its proof looks at, and the batches made of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlm.batch import Batch, Example
from vlm.data.build import Data
from vlm.data.collate import Collator
from vlm.data.conversation import Conversation
from vlm.data.scan import Scan
from vlm.errors import DataError

FIRST_ROWS = 64  # rows of the first epoch among which the short records are looked for
NUM_READ = 16  # records that are read; the shortest, those with images before the others
TEXT_TOKENS = (
    6  # a record with fewer is taken only if there is no other: what comes early must differ from what is late
)
NUM_COMPUTED = 2  # of these the model computes two


@dataclass(frozen=True)
class Record:
    conversation: Conversation
    example: Example  # what training makes of it


@dataclass(frozen=True)
class Subject:
    """The records of a proof. `computed` are the first two of `read`: short ones, with images where there are any."""

    read: list[Record]
    collator: Collator

    @property
    def computed(self) -> list[Record]:
        return self.read[:NUM_COMPUTED]

    def batch(self, rows: list[list[Record]]) -> Batch:
        """As training makes it, but no longer than its records.

        Raises:
            DataError: an image of them cannot be read.
        """
        collate = replace(self.collator, pad_to=None)
        batch = collate([[record.example for record in row] for row in rows])
        if batch.skipped:
            raise DataError(f"{batch.skipped[0].where}: {batch.skipped[0].message}")
        return batch


def choose(data: Data) -> list[int]:
    """Numbers of the records to read, the two to compute first. Raises DataError if none can be read."""
    plan = data.train.plan
    first = np.concatenate([np.asarray(row, dtype=np.int64) for row in plan.rows(0)[:FIRST_ROWS]])
    lengths, num_images = plan.scan.lengths[first], plan.scan.num_images[first]
    is_terse = lengths - num_images * plan.scan.reader.tokenizer.tokens_per_image < TEXT_TOKENS
    order = np.lexsort((np.arange(len(first)), lengths, is_terse, num_images == 0))  # the last key counts first
    chosen: list[tuple[int, Record]] = []
    for number in dict.fromkeys(first[order].tolist()):
        try:
            record = read_record(plan.scan, number)
            Subject([record], data.train.collator).batch([[record]])
            chosen.append((number, record))
        except DataError:
            continue  # training skips it too, counts it and names it
        if len(chosen) == NUM_READ:
            break
    if not chosen:
        raise DataError("none of the first records can be read; `vlm data check CONFIG` says why")
    first_record = chosen[0][1]
    others = sorted(chosen[1:], key=lambda entry: _likeness(first_record.example, entry[1].example))
    return [chosen[0][0], *(number for number, _ in others)]


def read_record(scan: Scan, number: int) -> Record:
    """Raises RecordError."""
    source, local = scan.reader.locate(number)
    example = scan.reader.read(number)
    conversation = source.conversation(local)
    return Record(_as_far_as(conversation, scan), example)


def _as_far_as(conversation: Conversation, scan: Scan) -> Conversation:
    """The turns that training kept of a record that is too long."""
    reader = scan.reader
    for count in range(len(conversation.turns), 1, -1):
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


def other_images(batch: Batch, first: int, count: int) -> Batch:
    """The batch with noise for images `first` to `first + count`: of pixels, or of features by channel."""

    def changed(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        part = values[first : first + count].float()
        noise = torch.randn(part.shape, generator=torch.Generator().manual_seed(0)).to(part.device)
        if values is batch.image_features:
            std, mean = torch.std_mean(values.float(), dim=(0, 1))
            noise = noise * std + mean
        return torch.cat([values[:first], noise.to(values.dtype), values[first + count :]])

    return replace(batch, pixel_values=changed(batch.pixel_values), image_features=changed(batch.image_features))


def images_moved(batch: Batch, count: int) -> Batch:
    """The first `count` images after all others."""

    def moved(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.roll(-count, 0)

    return replace(batch, pixel_values=moved(batch.pixel_values), image_features=moved(batch.image_features))
