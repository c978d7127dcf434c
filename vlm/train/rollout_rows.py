"""Replies to prompts -> the rows that a step learns from: a question with its image tokens once, then its replies.

Letters: B rows, L tokens, N tiles of images, S pixels per side, P patches, C width of the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vlm.batch import IGNORE_INDEX, Batch, Example, Prompt, Rollouts
from vlm.data.collate import Collator


@dataclass
class Group:
    """The replies to one prompt."""

    prompt: Prompt
    replies: list[list[int]]  # token ids, the token that ends a reply included
    advantages: list[float] = field(default_factory=list)  # of each reply


@dataclass(frozen=True)
class RowMaker:
    """Lays out the replies of a micro-batch.

    Args:
        collator: of text alone.
        max_length: tokens of a row.
        shares: whether replies in a row may share their question.
        packs: whether a row may hold several replies.
    """

    collator: Collator
    max_length: int
    shares: bool
    packs: bool

    def __call__(self, groups: Sequence[Group], source: Batch, features: Tensor | None) -> Batch:
        """The batch of some groups.

        Args:
            groups: of the prompts of `source`, in their order; some may be missing.
            source: the batch that brought the prompts.
            features: [N, P, C] of all images of `source`, where a frozen encoder has made them.
        """
        rows, shown, numbers = self._rows(groups)
        batch = replace(self.collator, pad_to=None)(rows or [[]], source.skipped)
        images = source.image_features if features is None else features
        tiles = _tiles(source.prompts, shown)
        length = batch.input_ids.shape[1]
        number = torch.full((len(batch.input_ids), length), -1, dtype=torch.int64)
        for row, (examples, members) in enumerate(zip(rows, numbers, strict=True)):
            start = 0
            for example, reply in zip(examples, members, strict=True):
                end = start + len(example.input_ids) - example.stem
                number[row, start:end] = reply
                start = end
        worth = torch.tensor([value for group in groups for value in group.advantages] or [0.0])
        return replace(
            batch,
            pixel_values=None if images is not None or not len(tiles) else _chosen(source.pixel_values, tiles),
            image_features=_chosen(images, tiles),
            where=[prompt.where for prompt in source.prompts],
            rollouts=Rollouts(
                number,
                sum(len(group.replies) for group in groups),
                torch.where(number < 0, 0.0, worth[number.clamp_min(0)]),
            ),
        )

    def _rows(self, groups: Sequence[Group]) -> tuple[list[list[Example]], list[Prompt], list[list[int]]]:
        """Rows of examples; the prompts whose images they show, in order; the number of each example's reply."""
        rows: list[list[Example]] = []
        shown: list[Prompt] = []
        numbers: list[list[int]] = []
        left, number = 0, 0
        for group in groups:
            asked = group.prompt.input_ids
            stem = 0  # of the group in the row that is being filled
            for reply in group.replies:
                needed = len(asked) + len(reply) - stem
                if not rows or not self.packs or needed > left:
                    stem, left, needed = 0, self.max_length, len(asked) + len(reply)
                    rows.append([])
                    numbers.append([])
                labels = [IGNORE_INDEX] * len(asked) + reply
                rows[-1].append(Example([*asked, *reply], labels, where=group.prompt.where, stem=stem))
                numbers[-1].append(number)
                if not stem:
                    shown.append(group.prompt)
                stem = len(asked) if self.shares else 0
                left -= needed
                number += 1
        return rows, shown, numbers


def _tiles(prompts: Sequence[Prompt], shown: Sequence[Prompt]) -> Tensor:
    """Which tiles of a batch the prompts `shown` have, one after the other, int64 [n]."""
    starts, at = {}, 0
    for prompt in prompts:
        starts[id(prompt)] = at
        at += prompt.num_tiles
    places = [starts[id(prompt)] + tile for prompt in shown for tile in range(prompt.num_tiles)]
    return torch.tensor(places, dtype=torch.int64)


def _chosen(images: Tensor | None, tiles: Tensor) -> Tensor | None:
    """Some of the images [N, ...]; None where there were none to choose from."""
    return None if images is None else images[tiles.to(images.device)]
