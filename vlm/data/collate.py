"""Packed examples -> Batch: images decoded, positions restarted, padding added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vlm.batch import IGNORE_INDEX, Batch, Example, ImageSpec, Prompt, Replies, Skip
from vlm.data.features import FeatureStore
from vlm.data.images import load_tiles
from vlm.data.sharing import find_pair_stem, find_stem, may_join
from vlm.errors import RecordError


class _Placed(NamedTuple):
    """An example in its row."""

    example: Example
    shared: int  # of its first tokens, which stand there already

    is_chosen: bool | None = None  # of a branch of a preference

    @property
    def length(self) -> int:
        return len(self.example.input_ids) - self.shared

    @property
    def is_good(self) -> bool | None:
        return self.example.is_good if self.is_chosen is None else self.is_chosen


@dataclass(frozen=True)
class Collator:
    """Turns rows of examples into a batch.

    Args:
        image_spec: None for a model without images.
        pad_to: tokens of every row; None pads to the longest of the batch, rounded up to a multiple of 8.
        max_pixels: images with more are left out, with their example.
        features: where the encoder's features of every image are; then images are not decoded at all.
        jpeg_draft: decode large JPEG files at reduced scale.
        image_token_id: given, a record that begins as the one before it does, with an image, shares its tokens.
        shares_questions: the second branch of a preference shares what both begin with.
    """

    image_spec: ImageSpec | None
    pad_token_id: int
    max_pixels: int
    pad_to: int | None = None
    features: FeatureStore | None = None
    image_token_id: int | None = None
    jpeg_draft: bool = False
    shares_questions: bool = False

    def __call__(self, rows: Sequence[Sequence[Example]], skips: Sequence[Skip] = ()) -> Batch:
        """A batch of `len(rows)` rows. An example whose image cannot be read is left out and listed in `skipped`.

        Args:
            skips: examples that were lost before, while reading their records.
        """
        skipped = list(skips)
        kept_rows: list[list[_Placed]] = []
        pixels: list[Tensor] = []
        prompts: list[Prompt] = []
        for row in rows:
            kept: list[_Placed] = []
            for example in row:
                placed = self._place(kept, example)
                try:
                    found = [image for each in placed if not each.shared for image in self._pixels(each.example)]
                except RecordError as error:
                    skipped.append(Skip(error.rule, example.where, error.message))
                    continue
                pixels += found
                kept += placed
                if example.answer is not None:
                    prompts.append(_prompt(example, example.answer, sum(map(len, found))))
            kept_rows.append(kept)
        longest = max((sum(placed.length for placed in row) for row in kept_rows), default=0)
        length = self.pad_to or max(8, -(-longest // 8) * 8)
        ids, labels, positions = (
            torch.stack([row[part] for row in (self._row(row, length) for row in kept_rows)]) for part in range(3)
        )
        num_tokens = sum(placed.length for row in kept_rows for placed in row)
        return Batch(
            input_ids=ids,
            labels=labels,
            position_ids=positions,
            pixel_values=torch.cat(pixels) if pixels and self.features is None else None,
            # none are told from no features: then an engine whose ranks make the same calls lets the encoder be
            image_features=torch.cat(pixels or [torch.zeros(0, 1, 1)]) if self.features is not None else None,
            where=[placed.example.where for row in kept_rows for placed in row],
            skipped=skipped,
            num_padding=ids.numel() - num_tokens,
            replies=_replies(kept_rows, length),
            prompts=tuple(prompts),
        )

    def _place(self, before: list[_Placed], example: Example) -> list[_Placed]:
        """What an example brings to its row: of a preference both branches."""
        if example.rejected is None:
            return [_Placed(example, example.stem or self._num_shared(before, example))]
        chosen, rejected = example.branches
        shared = find_pair_stem(example) if self.shares_questions else 0
        return [_Placed(chosen, 0, True), _Placed(rejected, shared, False)]

    def _num_shared(self, before: list[_Placed], example: Example) -> int:
        """Tokens that the example need not bring, since the row's last record without any such begins with them."""
        root = next((each.example for each in reversed(before) if not each.shared), None)
        if self.image_token_id is None or root is None or root.images != example.images:
            return 0
        stem = find_stem(root, self.image_token_id)
        return stem if stem and stem == find_stem(example, self.image_token_id) and may_join(root, example, stem) else 0

    def _pixels(self, example: Example) -> list[Tensor]:
        """Of each image, float32 [tiles, 3, S, S], or features [tiles, P, C]; none for a model without images."""
        if self.image_spec is None:
            return []
        if self.features is not None:
            return [self._features(self.features, image) for image in example.images]
        return [load_tiles(image, self.image_spec, self.max_pixels, self.jpeg_draft) for image in example.images]

    def _features(self, store: FeatureStore, image: str | bytes) -> Tensor:
        """[tiles, P, C]. Raises RecordError: rule image_unreadable, or image_missing."""
        features = store.get(image)
        if features is None:  # it could not be encoded when the cache was filled, or has changed since
            raise RecordError("image_unreadable", f"no features of {_name(image)} in data.cache")
        return features

    def _row(self, row: list[_Placed], length: int) -> tuple[Tensor, Tensor, Tensor]:
        """`input_ids`, `labels` and `position_ids` of one row, int64 [length] each."""
        ids = torch.full((length,), self.pad_token_id, dtype=torch.int64)
        labels = torch.full((length,), IGNORE_INDEX, dtype=torch.int64)
        positions = torch.zeros(length, dtype=torch.int64)  # every padding token is a sequence of its own
        start = 0
        for example, shared, _ in row:
            end = start + len(example.input_ids) - shared
            ids[start:end] = torch.tensor(example.input_ids[shared:])
            labels[start:end] = torch.tensor(example.labels[shared:])
            positions[start:end] = torch.arange(shared, len(example.input_ids))
            start = end
        return ids, labels, positions


def _replies(rows: Sequence[Sequence[_Placed]], length: int) -> Replies | None:
    """Of `length` tokens per row; None where nothing is compared or judged."""
    if all(placed.is_good is None for row in rows for placed in row):
        return None
    number = torch.full((len(rows), length), -1, dtype=torch.int64)
    is_good: list[bool] = []
    reference: list[float] = []
    for row, placed_in_row in enumerate(rows):
        start = 0
        for placed in placed_in_row:
            assert placed.is_good is not None
            number[row, start : start + placed.length] = len(is_good)
            start += placed.length
            is_good.append(placed.is_good)
            reference += placed.example.reference[1:] if placed.is_chosen is False else placed.example.reference[:1]
    known = torch.tensor(reference, dtype=torch.float32) if len(reference) == len(is_good) else None
    return Replies(number, torch.tensor(is_good, dtype=torch.bool), known)


def _prompt(example: Example, answer: str, num_tiles: int) -> Prompt:
    """What stands before the first token that would be learned."""
    start = next(place for place, label in enumerate(example.labels) if label != IGNORE_INDEX)
    return Prompt(example.input_ids[:start], num_tiles, answer, example.where, example.images)


def _name(image: str | bytes) -> str:
    return "the image" if isinstance(image, bytes) else image.rpartition("/")[2]
