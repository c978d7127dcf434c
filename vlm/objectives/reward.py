"""A reward model: the preferred reply of a pair shall score higher than the other one.

Letters: B rows, L tokens, D width of the language model, R replies of a batch, of which 2n and 2n + 1 are the preferred
and the other of pair n.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, final

from pydantic import NonNegativeFloat

from vlm.objectives.base import Head, LossOutput
from vlm.objectives.preference import PAIR_METRICS, PairConfig, pair_metrics

if TYPE_CHECKING:
    from torch import Tensor

    from vlm.batch import Batch


@final
class PairwiseReward:
    """The model of Bradley & Terry (1952) over the scores of the value head, as Stiennon et al. 2020 (arXiv:2009.01325)
    train it; `center` is the penalty of Eisenstein et al. 2023 (arXiv:2312.09244), which keeps scores near 0."""

    metric_names: tuple[str, ...] = PAIR_METRICS

    def __init__(self, margin: float, center: float) -> None:
        self.margin = margin
        self.center = center

    def normalizer(self, batch: Batch) -> int:
        return 0 if batch.replies is None else batch.replies.num_pairs

    def num_head_calls(self, batch: Batch) -> int:
        return 1

    def reads(self, batch: Batch) -> Tensor | None:
        """bool [B, L]: the last token of every reply."""
        import torch

        row, at = reply_ends(batch)
        is_read = torch.zeros_like(batch.labels, dtype=torch.bool)
        return is_read.index_put((row, at), torch.ones_like(row, dtype=torch.bool))

    def loss(self, hidden_states: Tensor, batch: Batch, head: Head) -> LossOutput:
        """hidden_states: [B, L, D]. The loss is a float32 scalar; see `Objective`."""
        return self.of_rewards(reward_replies(hidden_states, batch, head))

    def of_rewards(self, rewards: Tensor) -> LossOutput:
        """Sums over the pairs of the scores of their replies, float32 [R]."""
        import torch.nn.functional as F

        chosen, rejected = rewards[0::2], rewards[1::2]
        loss = -F.logsigmoid(chosen - rejected - self.margin).sum()
        if self.center:
            loss = loss + self.center * ((chosen + rejected) ** 2).sum()
        return LossOutput(loss, pair_metrics(rewards))


def reward_replies(hidden_states: Tensor, batch: Batch, head: Head) -> Tensor:
    """The value head's score of every reply of a batch, float32 [R], from hidden states [B, L, D] after the final norm.

    It has a graph through the head where there is no reply too.
    """
    from vlm.batch import send

    assert head.values is not None  # `model.trainable` names the head; see `ObjectiveConfig.why_not_parts`
    row, at = (send(each, hidden_states.device) for each in reply_ends(batch))
    return head.values(hidden_states[row, at])


def reply_ends(batch: Batch) -> tuple[Tensor, Tensor]:
    """Row and place of the last supervised token of every reply, int64 [R] each: the one that has seen all of it."""
    import torch

    from vlm.models.loss import find_supervised

    if batch.replies is None:  # rows of padding alone
        nothing = torch.zeros(0, dtype=torch.int64)
        return nothing, nothing
    row, _, at = find_supervised(batch.labels, batch.position_ids)
    last = torch.full((len(batch.replies.is_good),), -1, dtype=torch.int64)
    last.scatter_reduce_(0, batch.replies.number[row, at], row * batch.labels.shape[1] + at, "amax")
    return last // batch.labels.shape[1], last % batch.labels.shape[1]


class RewardConfig(PairConfig):
    kind: Literal["reward"] = "reward"
    """Pairs of replies, of which the preferred one shall get the higher score from a value head."""
    margin: NonNegativeFloat = 0.0
    """By how much the score of the preferred reply shall lead."""
    center: NonNegativeFloat = 0.0
    """Weight of the squared sum of both scores, which keeps scores near 0; 0.01 is usual."""

    needs_value_head: ClassVar = True

    def build(self) -> PairwiseReward:
        return PairwiseReward(self.margin, self.center)
