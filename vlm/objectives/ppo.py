"""Replies that the model writes itself, each judged by what a value head had expected at each of its tokens.

Letters: B rows, L tokens, D width of the language model, S supervised tokens, R replies of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, final

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from vlm.objectives.base import Head, LossOutput
from vlm.objectives.grpo import GROUP_NUMBERS, ClippedPolicy, RolloutConfig, TokenScores

if TYPE_CHECKING:
    from torch import Tensor

    from vlm.batch import Batch

VALUE_NUMBERS = frozenset({"kl", "value"})


@final
class ClippedPolicyAndValue(ClippedPolicy):
    """Proximal policy optimization (Schulman et al. 2017, arXiv:1707.06347) of replies: the clipped ratio of
    `ClippedPolicy`, and the squared distance of the value head from `Rollouts.returns`, clipped as the policy is
    (Stiennon et al. 2020, arXiv:2009.01325; the losses are those of TRL's PPOTrainer).

    A batch without rollouts is language modelling of the records' answers, in which the value head has no part.

    Args:
        temperature: as of `ClippedPolicy`.
        clip: how far the ratio may go from 1.
        value_clip: how far a value may go from the one before the update.
        value_weight: of the value head's loss, half of a squared distance.
    """

    def __init__(self, *, temperature: float, clip: float, value_clip: float, value_weight: float) -> None:
        super().__init__(
            temperature=temperature, clip_low=clip, clip_high=clip, kl=0.0, average="tokens", max_new_tokens=1
        )
        self.value_clip = value_clip
        self.value_weight = value_weight
        self.metric_names = ("clipped", "value_loss")

    def loss(self, hidden_states: Tensor, batch: Batch, head: Head) -> LossOutput:
        """hidden_states: [B, L, D]. The loss is a float32 scalar; see `Objective`."""
        import torch

        from vlm.batch import send
        from vlm.models.loss import find_supervised

        output = super().loss(hidden_states, batch, head)
        rollouts = batch.rollouts
        if rollouts is None:
            return output
        assert rollouts.returns is not None
        assert rollouts.values is not None
        row, _, at = find_supervised(batch.labels, batch.position_ids)
        returns, before = (send(each[row, at], hidden_states.device) for each in (rollouts.returns, rollouts.values))
        values = token_values(hidden_states, batch, head)
        near = before + (values - before).clamp(-self.value_clip, self.value_clip)
        worse = torch.maximum((values - returns) ** 2, (near - returns) ** 2)
        of_values = 0.5 * worse.sum()
        metrics = {"clipped": output.metrics["clipped"], "value_loss": of_values.detach()}
        return LossOutput(output.loss + self.value_weight * of_values, metrics)


class TokenValues(TokenScores):
    """Keeps the value of every supervised token too, from the same forward pass."""

    def __init__(self, temperature: float) -> None:
        super().__init__(temperature)
        self.values: list[Tensor] = []  # as `found`

    def loss(self, hidden_states: Tensor, batch: Batch, head: Head) -> LossOutput:
        """hidden_states: [B, L, D]. As `TokenScores`."""
        self.values.append(token_values(hidden_states, batch, head).detach().cpu())
        return super().loss(hidden_states, batch, head)


def token_values(hidden_states: Tensor, batch: Batch, head: Head) -> Tensor:
    """What the value head expects before each supervised token, float32 [S], in the order of `find_supervised`.

    Args:
        hidden_states: [B, L, D], after the final norm.
    """
    from vlm.batch import send
    from vlm.models.loss import find_supervised

    assert head.values is not None  # `model.trainable` names the head; see `ObjectiveConfig.why_not_parts`
    row, before, _ = find_supervised(batch.labels, batch.position_ids)
    return head.values(hidden_states[send(row, hidden_states.device), send(before, hidden_states.device)])


def estimate_advantages(
    scores: Sequence[float],
    number: Sequence[int],
    values: Sequence[float],
    penalties: Sequence[float],
    discount: float,
    smoothing: float,
) -> list[float]:
    """Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438) of each token; its return with its
    value added.

    Args:
        scores: of each reply, given at its last token.
        number: which reply a token is of; the tokens of a reply follow each other.
        values: expected before each token.
        penalties: of each token, taken from its reward.
        discount: gamma of the paper.
        smoothing: lambda of the paper.

    >>> estimate_advantages([1.0], [0, 0], [0.5, 0.25], [0.0, 0.0], 1.0, 1.0)
    [0.5, 0.75]
    >>> estimate_advantages([1.0, 3.0], [0, 0, 1], [0.5, 0.25, 1.0], [0.1, 0.0, 0.0], 1.0, 0.0)
    [-0.35, 0.75, 2.0]
    """
    found = [0.0] * len(number)
    lead = following = 0.0
    for place in range(len(number) - 1, -1, -1):
        is_last = place + 1 == len(number) or number[place + 1] != number[place]
        if is_last:
            lead = following = 0.0
        reward = (scores[number[place]] if is_last else 0.0) - penalties[place]
        lead = reward + discount * following - values[place] + discount * smoothing * lead
        following = values[place]
        found[place] = lead
    return found


class PPOConfig(RolloutConfig):
    kind: Literal["ppo"] = "ppo"
    """Replies that the model writes itself, judged by rewards and by what a value head had expected."""
    group_size: PositiveInt = 1
    """Replies to each prompt."""
    updates: PositiveInt = 4
    """Updates of the weights that a step makes with its replies."""
    clip: PositiveFloat = 0.2
    """How far from 1 the ratio of a token's probability to the one that it was drawn with still counts."""
    value_clip: PositiveFloat = 0.2
    """How far from its value before the step a value may go."""
    value_weight: PositiveFloat = 0.1
    """Weight of the value head's loss."""
    kl: NonNegativeFloat = 0.05
    """Taken from a token's reward for each nat that it is likelier than in the model that the run starts from; 0 keeps
    no copy of that."""
    discount: Annotated[float, Field(gt=0, le=1)] = 1.0
    """What the reward of the next token counts at this one."""
    smoothing: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Lambda of generalized advantage estimation: 1 trusts rewards alone, 0 the value head's next estimate."""

    needs_value_head: ClassVar = True

    @property
    def numbers(self) -> frozenset[str]:
        return super().numbers | VALUE_NUMBERS | (GROUP_NUMBERS if self.group_size > 1 else frozenset())

    def worth(self, rewards: Sequence[float]) -> list[float]:
        return list(rewards)

    def build(self) -> ClippedPolicyAndValue:
        return ClippedPolicyAndValue(
            temperature=self.temperature, clip=self.clip, value_clip=self.value_clip, value_weight=self.value_weight
        )
