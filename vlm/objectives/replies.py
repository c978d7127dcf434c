"""Log-probabilities of whole replies, and what the objectives that read them share.

Letters: B rows, L tokens, D width of the language model, V vocabulary, R replies of a batch, S supervised tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm.objectives.base import Head, LossOutput

if TYPE_CHECKING:
    from torch import Tensor

    from vlm.batch import Batch


@dataclass(frozen=True)
class Scores:
    """What the model says of the replies of a batch."""

    log_probs: Tensor  # float32 [R], summed over the tokens of each reply
    num_tokens: Tensor  # float32 [R], supervised ones, at least 1
    is_good: Tensor  # bool [R]
    reference: Tensor | None  # float32 [R], the reference model's `log_probs`

    @property
    def per_token(self) -> Tensor:
        """Mean log-probability of a token of each reply, float32 [R]."""
        return self.log_probs / self.num_tokens

    @property
    def gain(self) -> Tensor:
        """How much likelier each reply has become since the reference, in nats, float32 [R].

        Raises:
            ValueError: the batch brings no reference; usually it was made without `Scan.reference`.
        """
        if self.reference is None:
            raise ValueError("a batch of replies without the reference model's log-probabilities")
        return self.log_probs - self.reference


class ReplyObjective(ABC):
    """An objective of the log-probabilities of replies; see `Objective`. A loss states what it makes of `Scores`."""

    metric_names: tuple[str, ...] = ()

    @abstractmethod
    def normalizer(self, batch: Batch) -> int:
        """Pairs, or replies."""

    @abstractmethod
    def of_scores(self, scores: Scores) -> LossOutput:
        """Sums over the batch. Of no replies the loss is 0, with the graph of `scores.log_probs`."""

    def num_head_calls(self, batch: Batch) -> int:
        from vlm.models.loss import count_chunks

        return count_chunks(batch.num_supervised)

    def reads(self, batch: Batch) -> Tensor | None:
        from vlm.models.loss import predicts_supervised

        return predicts_supervised(batch.labels, batch.position_ids)

    def loss(self, hidden_states: Tensor, batch: Batch, head: Head) -> LossOutput:
        """hidden_states: [B, L, D]. The loss is a float32 scalar; see `Objective`."""
        return self.of_scores(score_replies(hidden_states, batch, head))


def score_replies(hidden_states: Tensor, batch: Batch, head: Head) -> Scores:
    """The log-probability of every reply of a batch, from hidden states [B, L, D] after the final norm.

    The sums have a graph through the head where there is no reply too.
    """
    import torch

    from vlm.batch import send
    from vlm.models.loss import find_supervised, log_probs_of_labels

    device, replies = hidden_states.device, batch.replies
    found = log_probs_of_labels(
        hidden_states, batch.labels, head, min_chunks=head.min_calls, position_ids=batch.position_ids
    )
    if replies is None:  # rows of padding alone
        nothing = torch.zeros(0, device=device)
        return Scores(found[:0], nothing, nothing.bool(), nothing)
    row, _, at = find_supervised(batch.labels, batch.position_ids)
    number = replies.number[row, at]
    count = torch.bincount(number, minlength=len(replies.is_good)).clamp_min(1).float()
    sums = found.new_zeros(len(replies.is_good)).index_add(0, send(number, device), found)
    reference = None if replies.reference is None else send(replies.reference, device)
    return Scores(sums, send(count, device), send(replies.is_good, device), reference)


class ReplyScores(ReplyObjective):
    """Trains nothing: keeps the log-probabilities of the replies of every batch that is evaluated with it."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []  # float32 [R] of each batch, host memory

    def normalizer(self, batch: Batch) -> int:
        return 0 if batch.replies is None else len(batch.replies.is_good)

    def of_scores(self, scores: Scores) -> LossOutput:
        self.found.append(scores.log_probs.detach().cpu())
        return LossOutput(-scores.log_probs.sum())
