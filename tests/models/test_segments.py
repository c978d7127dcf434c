"""Records one by one: where rows are cut, what goes together, and that hidden states come back to their places."""

from __future__ import annotations

import torch

from vlm.models.segments import Segment, decode_one_by_one, find_segments, group_segments


def test_a_row_is_cut_where_positions_restart_and_its_padding_is_left_out():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7]])
    assert find_segments(positions) == [Segment(0, 3), Segment(3, 2), Segment(5, 1), Segment(8, 8)]


def test_records_go_together_while_less_than_half_is_padding_and_the_batch_is_no_larger_than_it_was():
    segments = [Segment(0, 4), Segment(4, 10), Segment(14, 6), Segment(20, 9), Segment(29, 1)]
    assert [[s.length for s in group] for group in group_segments(segments, 20)] == [[10, 9], [6, 4], [1]]
    assert [[s.length for s in group] for group in group_segments(segments, 1)] == [[10], [9], [6], [4], [1]]


def running_sum(embeddings: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """A decoder whose state runs along the row, and which sees positions."""
    return embeddings.cumsum(1) + 100 * position_ids[..., None]


def test_a_running_state_starts_again_with_every_record():
    embeddings = torch.tensor([[1.0, 2, 3, 4, 5, 9], [6, 7, 8, 9, 9, 9]])[..., None]
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 0, 0, 0]])
    hidden = decode_one_by_one(running_sum, embeddings, positions).squeeze(-1)
    assert hidden.tolist() == [[1, 103, 206, 4, 109, 9], [6, 113, 221, 9, 0, 0]]


def test_gradients_reach_each_token_from_its_own_record_only():
    embeddings = torch.ones(1, 5, 1, requires_grad=True)
    hidden = decode_one_by_one(running_sum, embeddings, torch.tensor([[0, 1, 2, 0, 1]]))
    hidden[0, 1].sum().backward()  # the second token of the first record
    assert embeddings.grad.flatten().tolist() == [1, 1, 0, 0, 0]
