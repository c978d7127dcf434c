"""Records of packed rows one by one, for decoders that would let them see each other.

Recurrent and convolution states run across records, ALiBi counts distances over them, and some classes read positions
from the attention mask. Each record becomes a row of its own, padded on the right: nothing in a causal decoder sees
what comes after it. Letters: B rows, L tokens, D width, S segments of one forward, l tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Forward = Callable[[Tensor, Tensor], Tensor]  # [S, l, D] and position_ids [S, l] -> hidden states [S, l, D]


class Segment(NamedTuple):
    start: int  # in the row-major order of all tokens of the batch
    length: int


def find_segments(position_ids: Tensor) -> list[Segment]:
    """Runs of rising positions, int64 [B, L].

    Of the padding that ends a row, where every token has position 0, only the first.

    >>> find_segments(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]))
    [Segment(start=0, length=3), Segment(start=3, length=2), Segment(start=5, length=2), Segment(start=7, length=1)]
    """
    segments = []
    for row, positions in enumerate(position_ids.tolist()):
        end = len(positions)
        while end > 1 and positions[end - 1] == positions[end - 2] == 0:
            end -= 1
        starts = [0, *(i for i in range(1, end) if positions[i] != positions[i - 1] + 1)]
        first = row * len(positions)
        segments += [Segment(first + start, stop - start) for start, stop in pairwise([*starts, end])]
    return segments


def group_segments(segments: Sequence[Segment], most_tokens: int) -> list[list[Segment]]:
    """Those that go through the decoder together: at most `most_tokens`, padding counted, of which less than half is.

    >>> [[s.length for s in group] for group in group_segments([Segment(0, 2), Segment(2, 7), Segment(9, 3)], 12)]
    [[7], [3, 2]]
    """
    groups: list[list[Segment]] = []
    for segment in sorted(segments, key=lambda segment: -segment.length):
        group = groups[-1] if groups else []
        longest = group[0].length if group else 0
        if not group or (len(group) + 1) * longest > most_tokens or 2 * segment.length <= longest:
            groups.append([segment])
        else:
            group.append(segment)
    return groups


def decode_one_by_one(
    forward: Forward,
    embeddings: Tensor,
    position_ids: Tensor,
    most_tokens: int | None = None,
) -> Tensor:
    """Hidden states [B, L, D] of packed rows, every record decoded as if it were alone.

    Args:
        forward: the decoder.
        embeddings: [B, L, D].
        position_ids: int64 [B, L], restarting with every record.
        most_tokens: of one forward, padding counted; None takes as many as the batch has, 1 a forward for each record.

    Returns:
        hidden states; zeros at the padding that ends a row.
    """
    flat = embeddings.flatten(0, 1)
    groups = group_segments(find_segments(position_ids), most_tokens or len(flat))
    states, places = [], []
    for group in groups:
        index, is_real = _rows(group, embeddings.device)
        hidden = forward(flat[index], torch.arange(index.shape[1], device=flat.device).expand_as(index))
        states.append(hidden[is_real])
        places.append(index[is_real])
    joined = torch.cat(states)
    out = joined.new_zeros(len(flat), joined.shape[-1]).index_copy(0, torch.cat(places), joined)
    return out.view(*position_ids.shape, -1)


def _rows(group: Sequence[Segment], device: torch.device) -> tuple[Tensor, Tensor]:
    """Which token stands where in the rows of a group, int64 [S, l], and where that is no padding, bool [S, l].

    Padding is the segment's last token once more: any vector would do, if its norm is usual.
    """
    starts, lengths = (torch.tensor(column)[:, None] for column in zip(*group, strict=True))
    steps = torch.arange(int(lengths.max()))
    index = starts + torch.minimum(steps, lengths - 1)
    return index.to(device), (steps < lengths).to(device)
