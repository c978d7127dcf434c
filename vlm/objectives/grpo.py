"""Replies that the model writes itself, each judged against the others to its question.

Letters: B rows, L tokens, D width of the language model, V vocabulary, S supervised tokens, R replies of a batch.
"""

from __future__ import annotations

import statistics
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from vlm.objectives.base import Head, LossOutput, ObjectiveConfig
from vlm.objectives.lm import LanguageModeling
from vlm.objectives.rewards import REWARDS, RewardConfig
from vlm.schema import OneOf

if TYPE_CHECKING:
    from torch import Tensor

    from vlm.batch import Batch

Average = Literal["tokens", "replies", "constant"]
ROLLOUT_NUMBERS = frozenset({"reward", "reply_tokens", "truncated", "not_judged"})
GROUP_NUMBERS = frozenset({"reward_std", "no_signal"})  # within groups
_LEAST_STD = 1e-4  # added to a group's standard deviation, as TRL does


class ClippedPolicy(LanguageModeling):
    """The clipped ratio of Schulman et al. 2017 (arXiv:1707.06347), token by token, over what `Batch.rollouts` says
    that a token is worth, and the KL divergence from the reference by the estimator k3.

    A batch without rollouts is language modelling of the records' answers: the held-out loss, and what the proof before
    the first step computes.

    Args:
        temperature: replies were drawn at; log-probabilities are of the distribution that it makes.
        kl: weight of the divergence; 0 needs no reference.
        average: "tokens": every token of a step counts alike; "replies": every reply; "constant": every token is
            divided by `max_new_tokens` times the number of replies, however long these are.
    """

    def __init__(
        self, *, temperature: float, clip_low: float, clip_high: float, kl: float, average: Average, max_new_tokens: int
    ) -> None:
        self.temperature = temperature
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.kl = kl
        self.average = average
        self.max_new_tokens = max_new_tokens
        self.metric_names = ("clipped", "kl") if kl else ("clipped",)

    def normalizer(self, batch: Batch) -> int:
        if batch.rollouts is None or self.average == "tokens":
            return super().normalizer(batch)
        return batch.rollouts.num_replies * (self.max_new_tokens if self.average == "constant" else 1)

    def loss(self, hidden_states: Tensor, batch: Batch, head: Head) -> LossOutput:
        """hidden_states: [B, L, D]. The loss is a float32 scalar; see `Objective`."""
        import torch

        from vlm.batch import send
        from vlm.models.loss import find_supervised

        rollouts = batch.rollouts
        if rollouts is None:
            output = super().loss(hidden_states, batch, head)
            nothing = torch.zeros((), device=hidden_states.device)
            return LossOutput(output.loss, dict.fromkeys(self.metric_names, nothing))
        said = token_log_probs(hidden_states, batch, head, self.temperature)
        row, _, at = find_supervised(batch.labels, batch.position_ids)

        def of_tokens(values: Tensor) -> Tensor:
            """float32 [B, L] -> [S], on the device."""
            return send(values[row, at], hidden_states.device)

        worth = of_tokens(rollouts.advantages)
        old = said.detach() if rollouts.old is None else of_tokens(rollouts.old)
        ratio = torch.exp(said - old)
        least, most = 1 - self.clip_low, 1 + self.clip_high
        losses = -torch.minimum(ratio * worth, ratio.clamp(least, most) * worth)
        seen = {"clipped": (((ratio < least) & (worth < 0)) | ((ratio > most) & (worth > 0))).float()}
        if self.kl:
            if rollouts.reference is None:
                raise ValueError("rollouts without the reference model's log-probabilities")
            apart = of_tokens(rollouts.reference) - said
            divergence = torch.exp(apart) - apart - 1
            losses = losses + self.kl * divergence
            seen["kl"] = divergence.detach()
        count = torch.bincount(rollouts.number[row, at], minlength=rollouts.num_replies).clamp_min(1)
        per_reply = send((1 / count)[rollouts.number[row, at]].float(), hidden_states.device)
        weights = per_reply if self.average == "replies" else torch.ones_like(per_reply)
        # metrics are divided by the same normalizer as the loss, and shall be means
        means = per_reply * self.max_new_tokens if self.average == "constant" else weights
        return LossOutput((losses * weights).sum(), {name: (value * means).sum() for name, value in seen.items()})


class TokenScores(LanguageModeling):
    """Trains nothing: keeps the log-probability of every supervised token of the batches that are evaluated with it."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.found: list[Tensor] = []  # float32 [S] of each batch, in the order of `find_supervised`, host memory

    def loss(self, hidden_states: Tensor, batch: Batch, head: Head) -> LossOutput:
        """hidden_states: [B, L, D]. Minus the sum of what is kept."""
        said = token_log_probs(hidden_states, batch, head, self.temperature)
        self.found.append(said.detach().cpu())
        return LossOutput(-said.sum())


def token_log_probs(hidden_states: Tensor, batch: Batch, head: Head, temperature: float) -> Tensor:
    """Log-probability of each supervised token at a temperature, float32 [S], in the order of `find_supervised`.

    Args:
        hidden_states: [B, L, D], after the final norm.
    """
    from vlm.models.loss import log_probs_of_labels

    warm = head if temperature == 1 else replace(head, logits=lambda states: head.logits(states).float() / temperature)
    return log_probs_of_labels(
        hidden_states, batch.labels, warm, min_chunks=head.min_calls, position_ids=batch.position_ids
    )


class RolloutConfig(ObjectiveConfig):
    """How replies are written and judged, for every objective of replies that the model writes itself."""

    group_size: PositiveInt
    """Replies to each prompt."""
    temperature: PositiveFloat = 1.0
    """Replies are drawn at; the loss is of this distribution too."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Replies are drawn from the likeliest tokens of so much probability; the loss is of all tokens."""
    top_k: NonNegativeInt = 0
    """Replies are drawn from so many of the likeliest tokens; 0 from all."""
    max_new_tokens: PositiveInt = 128
    """Tokens of a reply, its end included; fewer where a prompt leaves less of data.max_length."""
    replies_at_once: PositiveInt = 32
    """Replies that each data rank writes at the same time: more is faster, and takes memory for keys and values."""
    updates: PositiveInt = 1
    """Updates of the weights that a step makes with its replies."""
    shown_groups: NonNegativeInt = 1
    """Groups of each step that rollouts.jsonl keeps."""
    rewards: Annotated[tuple[Annotated[RewardConfig, OneOf(REWARDS)], ...], Field(min_length=1)]
    """What a reply is worth: a sum of named functions."""
    kl: NonNegativeFloat
    """Weight of the divergence from the model that the run starts from; 0 keeps no copy of that."""

    reads: ClassVar = "verifiable"
    writes_replies: ClassVar = True

    @property
    def keeps_start(self) -> bool:
        return self.kl > 0

    @property
    def updates_per_step(self) -> int:
        return self.updates

    def rows_of(self, max_length: int) -> int:
        """Of a prompt as long as a reply, with all replies as long as they may get."""
        return -(-(self.group_size + 1) * self.max_new_tokens // max_length)

    @property
    def numbers(self) -> frozenset[str]:
        return super().numbers | ROLLOUT_NUMBERS | {f"reward/{reward.label}" for reward in self.rewards}

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [reward.label for reward in self.rewards]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"rewards: {twice[0]} stands twice; give each a name of its own")
        if not any(reward.weight for reward in self.rewards):
            raise ValueError("rewards: every weight is 0, so there is nothing to learn; give one another weight")
        return self

    @abstractmethod
    def worth(self, rewards: Sequence[float]) -> list[float]:
        """What each reply of a group is worth, beside the others where that counts."""


class GRPOConfig(RolloutConfig):
    kind: Literal["grpo"] = "grpo"
    """Replies that the model writes itself, judged by rewards and compared with the others to their prompt."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Replies to each prompt."""
    scale_rewards: bool = True
    """Divide a reply's lead over the mean of its group by the group's standard deviation; false: Dr. GRPO."""
    clip_low: PositiveFloat = 0.2
    """How far below 1 the ratio of a token's probability to the one that it was drawn with still counts."""
    clip_high: PositiveFloat = 0.2
    """The same above 1; DAPO takes 0.28."""
    kl: NonNegativeFloat = 0.0
    """Weight of the KL divergence from the model that the run starts from; 0 computes none and keeps no copy of it."""
    average: Average = "tokens"
    """tokens: each token of a step counts alike (DAPO). replies: each reply (GRPO). constant: each token, over
    max_new_tokens (Dr. GRPO)."""

    @property
    def numbers(self) -> frozenset[str]:
        return super().numbers | GROUP_NUMBERS

    def worth(self, rewards: Sequence[float]) -> list[float]:
        return advantages(rewards, self.scale_rewards)

    def build(self) -> ClippedPolicy:
        return ClippedPolicy(
            temperature=self.temperature, clip_low=self.clip_low, clip_high=self.clip_high, kl=self.kl,
            average=self.average, max_new_tokens=self.max_new_tokens,
        )  # fmt: skip


def advantages(rewards: Sequence[float], scale: bool) -> list[float]:
    """What each reply of a group is worth: its lead over the mean, divided by the standard deviation if that is asked
    for. Zeros where all are rewarded alike.

    >>> advantages([1.0, 0.0, 0.0, 1.0], scale=False)
    [0.5, -0.5, -0.5, 0.5]
    >>> advantages([0.1, 0.1, 0.1], scale=True)
    [0.0, 0.0, 0.0]
    """
    if len(set(rewards)) < 2:
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    divisor = statistics.stdev(rewards) + _LEAST_STD if scale else 1.0
    return [(reward - mean) / divisor for reward in rewards]
