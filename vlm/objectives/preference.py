"""Objectives of pairs: the preferred reply shall become likelier than the other one.

Letters: R replies of a batch, of which 2n and 2n + 1 are the preferred and the other of pair n; P = R / 2 pairs.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, final

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from vlm.objectives.base import LossOutput, ObjectiveConfig
from vlm.objectives.replies import ReplyObjective, Scores

if TYPE_CHECKING:
    from torch import Tensor

    from vlm.batch import Batch

PAIR_METRICS = ("rewards_chosen", "rewards_rejected", "margin", "accuracy")


class PairObjective(ReplyObjective):
    """The loss is summed over pairs, and the normalizer counts them."""

    metric_names: tuple[str, ...] = PAIR_METRICS

    def normalizer(self, batch: Batch) -> int:
        return 0 if batch.replies is None else batch.replies.num_pairs

    @abstractmethod
    def losses(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """Loss of each pair, float32 [P], and the reward of each reply, float32 [R], without a graph."""

    def of_scores(self, scores: Scores) -> LossOutput:
        losses, rewards = self.losses(scores)
        return LossOutput(losses.sum(), pair_metrics(rewards))


def pair_metrics(rewards: Tensor) -> dict[str, Tensor]:
    """Sums over pairs of the rewards [R] of their replies; accuracy counts pairs whose preferred one has more."""
    chosen, rejected = rewards.detach().float()[0::2], rewards.detach().float()[1::2]
    margin = chosen - rejected
    values = (chosen.sum(), rejected.sum(), margin.sum(), (margin > 0).float().sum())
    return dict(zip(PAIR_METRICS, values, strict=True))


@final
class DPO(PairObjective):
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290); ipo of Azar et al. 2023
    (arXiv:2310.12036), hinge of Zhao et al. 2023 (arXiv:2305.10425)."""

    def __init__(self, loss: Literal["sigmoid", "ipo", "hinge"], beta: float, label_smoothing: float) -> None:
        self.kind = loss
        self.beta = beta
        self.label_smoothing = label_smoothing

    def losses(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """Float32 [P] and [R]. ipo takes means over the tokens of a reply, as TRL does."""
        import torch.nn.functional as F

        gain = scores.gain / scores.num_tokens if self.kind == "ipo" else scores.gain
        margin = gain[0::2] - gain[1::2]
        if self.kind == "ipo":
            losses = (margin - 1 / (2 * self.beta)) ** 2
        elif self.kind == "hinge":
            losses = F.relu(1 - self.beta * margin)
        else:  # a share of the pairs is taken to be labelled wrongly: cDPO
            losses = smoothed_loss(self.beta * margin, self.label_smoothing)
        return losses, self.beta * gain.detach()


@final
class ORPO(PairObjective):
    """Odds ratio preference optimization (Hong et al. 2024, arXiv:2403.07691), without a reference: cross entropy of
    the preferred reply, per token, and `beta` (the paper's lambda) times the loss of the odds ratio."""

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def losses(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """Float32 [P] and [R]."""
        import torch
        import torch.nn.functional as F

        mean = scores.per_token
        # log(p / (1 - p)); a mean that rounds to 0 has no odds
        odds = mean - torch.log(-torch.expm1(mean.clamp(max=-1e-7)))
        losses = -mean[0::2] - self.beta * F.logsigmoid(odds[0::2] - odds[1::2])
        return losses, self.beta * mean.detach()


@final
class SimPO(PairObjective):
    """Simple preference optimization (Meng et al. 2024, arXiv:2405.14734), without a reference: means over tokens, and
    a margin `gamma` that the preferred reply shall lead by."""

    def __init__(self, beta: float, gamma: float, label_smoothing: float) -> None:
        self.beta = beta
        self.gamma = gamma
        self.label_smoothing = label_smoothing

    def losses(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """Float32 [P] and [R]."""
        rewards = self.beta * scores.per_token
        margin = rewards[0::2] - rewards[1::2] - self.gamma
        return smoothed_loss(margin, self.label_smoothing), rewards.detach()


def smoothed_loss(margin: Tensor, share: float) -> Tensor:
    """-log sigmoid of margins [P], of which a share points the other way; float32 [P]."""
    import torch.nn.functional as F

    losses = -(1 - share) * F.logsigmoid(margin)
    return losses - share * F.logsigmoid(-margin) if share else losses


class PairConfig(ObjectiveConfig):
    reads: ClassVar = "preference"
    counted: ClassVar = "pairs"


Smoothing = Annotated[float, Field(ge=0, lt=0.5)]


class DPOConfig(PairConfig):
    kind: Literal["dpo"] = "dpo"
    """Pairs of replies, compared with the model that the run starts from."""
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """sigmoid: DPO itself."""
    beta: PositiveFloat = 0.1
    """How strongly the model is held to the one it starts from: smaller lets it go farther."""
    label_smoothing: Smoothing = 0.0
    """sigmoid: share of the pairs that is taken to be labelled the wrong way round."""

    needs_reference: ClassVar = True

    @model_validator(mode="after")
    def _smoothing_is_of_sigmoid(self) -> DPOConfig:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is of loss: sigmoid, not of {self.loss}")
        return self

    def build(self) -> DPO:
        return DPO(self.loss, self.beta, self.label_smoothing)


class ORPOConfig(PairConfig):
    kind: Literal["orpo"] = "orpo"
    """Pairs of replies: cross entropy of the preferred one, and the odds of it over the other. No reference."""
    beta: PositiveFloat = 0.1
    """Weight of the odds ratio beside the cross entropy; the paper's lambda."""

    def build(self) -> ORPO:
        return ORPO(self.beta)


class SimPOConfig(PairConfig):
    kind: Literal["simpo"] = "simpo"
    """Pairs of replies by their mean log-probability per token. No reference."""
    beta: PositiveFloat = 2.0
    """Factor of the mean log-probabilities."""
    gamma: NonNegativeFloat = 1.0
    """By how much, times beta included, the preferred reply shall lead."""
    label_smoothing: Smoothing = 0.0
    """Share of the pairs that is taken to be labelled the wrong way round."""

    def build(self) -> SimPO:
        return SimPO(self.beta, self.gamma, self.label_smoothing)
