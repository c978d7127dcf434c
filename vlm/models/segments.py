"""Where the records of packed rows lie, and decoding them one by one for decoders that would let them see each other.

A record begins where positions restart at 0. Records that share their beginning (an image, and what precedes it) stand
once: the first of them whole, of each other one only what follows the beginning, its positions going on from there.
Such a segment is a branch: its tokens see the beginning and themselves.

Recurrent and convolution states run across records, ALiBi counts distances over them, and some classes read positions
from the attention mask. There each record becomes a row of its own, padded on the right: nothing in a causal decoder
sees what comes after it.

Letters: B rows, L tokens, D width, S segments of one forward, l tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vlm.batch import send

Forward = Callable[[Tensor, Tensor], Tensor]  # [S, l, D] and position_ids [S, l] -> hidden states [S, l, D]


class Segment(NamedTuple):
    start: int  # in the row-major order of all tokens of the batch
    length: int
    root: int = 0  # of a branch: the number of the segment that begins it
    shared: int = 0  # of a branch: how many tokens of that one it sees


def find_segments(position_ids: Tensor) -> list[Segment]:
    """Runs of rising positions, int64 [B, L].

    Of the padding that ends a row, where every token has position 0, only the first.

    >>> find_segments(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]))[1:3]
    [Segment(start=3, length=2, root=0, shared=0), Segment(start=5, length=2, root=0, shared=0)]
    >>> find_segments(torch.tensor([[0, 1, 0, 1, 2, 2, 3]]))[1:]  # the last sees the two tokens at 2 and 3
    [Segment(start=2, length=3, root=0, shared=0), Segment(start=5, length=2, root=1, shared=2)]
    """
    segments: list[Segment] = []
    root = 0
    for row, positions in enumerate(position_ids.tolist()):
        end = len(positions)
        while end > 1 and positions[end - 1] == positions[end - 2] == 0:
            end -= 1
        starts = [0, *(i for i in range(1, end) if positions[i] != positions[i - 1] + 1)]
        for start, stop in zip(starts, [*starts[1:], end], strict=True):
            shared = positions[start] if start else 0
            root = root if shared else len(segments)
            place = row * len(positions) + start
            segments.append(Segment(place, stop - start, root if shared else 0, shared))
    return segments


def group_segments(segments: Sequence[Segment], most_tokens: int) -> list[list[Segment]]:
    """Those that go through the decoder together: at most `most_tokens`, padding counted, of which less than half is.

    A branch counts with what it shares.

    >>> [[s.length for s in group] for group in group_segments([Segment(0, 2), Segment(2, 7), Segment(9, 3)], 12)]
    [[7], [3, 2]]
    """
    groups: list[list[Segment]] = []
    for segment in sorted(segments, key=lambda segment: -_whole(segment)):
        group = groups[-1] if groups else []
        longest = _whole(group[0]) if group else 0
        if not group or (len(group) + 1) * longest > most_tokens or 2 * _whole(segment) <= longest:
            groups.append([segment])
        else:
            group.append(segment)
    return groups


def _whole(segment: Segment) -> int:
    return segment.length + segment.shared


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
        position_ids: int64 [B, L], restarting with every record. In host memory, nothing waits for the device.
        most_tokens: of one forward, padding counted; None takes as many as the batch has, 1 a forward for each record.

    Returns:
        hidden states; zeros at the padding that ends a row.
    """
    flat = embeddings.flatten(0, 1)
    segments = find_segments(position_ids)
    states, places = [], []
    for group in group_segments(segments, most_tokens or len(flat)):
        index, is_own = _rows(group, [segments[segment.root].start for segment in group])
        steps = send(torch.arange(index.shape[1]), flat.device)
        hidden = forward(flat[send(index, flat.device)], steps.expand_as(index))
        states.append(hidden.flatten(0, 1)[send(is_own.flatten().nonzero().flatten(), flat.device)])
        places.append(send(index[is_own], flat.device))
    joined = torch.cat(states)
    out = joined.new_zeros(len(flat), joined.shape[-1]).index_copy(0, torch.cat(places), joined)
    return out.view(*position_ids.shape, -1)


def _rows(group: Sequence[Segment], roots: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which token stands where in the rows of a group, int64 [S, l], and which are the segment's own, bool [S, l].

    A branch begins with what it shares. Padding is the segment's last token once more: any vector would do, if its norm
    is usual.

    Args:
        roots: where the segment begins that each shares with; of no meaning where it shares nothing.
    """
    starts, lengths, _, shared = (torch.tensor(column)[:, None] for column in zip(*group, strict=True))
    steps = torch.arange(int((lengths + shared).max()))
    own = starts + torch.minimum(steps - shared, lengths - 1)
    index = torch.where(steps < shared, torch.tensor(roots)[:, None] + steps, own)
    return index, (steps >= shared) & (steps < lengths + shared)
