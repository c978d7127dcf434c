"""Replies that were judged one by one: good ones shall become likelier than under the reference, bad ones less likely.

Letters: R replies of a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, final

from pydantic import PositiveFloat

from vlm.objectives.base import LossOutput, ObjectiveConfig
from vlm.objectives.replies import ReplyObjective, Scores

if TYPE_CHECKING:
    from vlm.batch import Batch


@final
class KTO(ReplyObjective):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv:2402.01306) with the reference point 0.

    The paper estimates that point from replies that do not belong to their questions, over a micro-batch, so that its
    loss depends on how a step is cut. Without it each reply counts alike everywhere, and no forward pass is added.
    """

    metric_names: tuple[str, ...] = ("rewards_good", "rewards_bad", "share_good", "accuracy")

    def __init__(self, beta: float, good_weight: float, bad_weight: float) -> None:
        self.beta = beta
        self.good_weight = good_weight
        self.bad_weight = bad_weight

    def normalizer(self, batch: Batch) -> int:
        return 0 if batch.replies is None else len(batch.replies.is_good)

    def of_scores(self, scores: Scores) -> LossOutput:
        import torch

        rewards, is_good = self.beta * scores.gain, scores.is_good
        signed = torch.where(is_good, rewards, -rewards)
        weights = torch.where(is_good, self.good_weight, self.bad_weight)
        seen = rewards.detach()
        metrics = {
            "rewards_good": seen.masked_fill(~is_good, 0).sum(),
            "rewards_bad": seen.masked_fill(is_good, 0).sum(),
            "share_good": is_good.float().sum(),
            "accuracy": (signed.detach() > 0).float().sum(),
        }
        return LossOutput((weights * torch.sigmoid(-signed)).sum(), metrics)


class KTOConfig(ObjectiveConfig):
    kind: Literal["kto"] = "kto"
    """Replies that were judged good or bad, compared with the model that the run starts from."""
    beta: PositiveFloat = 0.1
    """How strongly the model is held to the one it starts from: smaller lets it go farther."""
    good_weight: PositiveFloat = 1.0
    """Weight of good replies; the paper advises weight times number of good ones to be 1 to 4/3 of the bad ones'."""
    bad_weight: PositiveFloat = 1.0
    """Weight of bad replies."""

    reads: ClassVar = "judged"
    counted: ClassVar = "replies"
    needs_reference: ClassVar = True

    def build(self) -> KTO:
        return KTO(self.beta, self.good_weight, self.bad_weight)
