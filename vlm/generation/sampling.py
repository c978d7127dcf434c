"""Logits -> the next token of each of many replies that were asked for with different settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

_NUCLEUS_TRY = 1024  # likeliest tokens that usually hold all of `top_p`; sorting the whole vocabulary costs much more
LEAST_TEMPERATURE = 1e-5  # below it the likeliest token is taken: dividing by it might give no numbers


class Constraint(Protocol):
    """What one reply may be, token by token."""

    def allowed(self) -> Tensor:
        """bool [V] on the CPU: the tokens that may come next, at least one."""

    def accept(self, token: int) -> None:
        """Take in the token that was chosen."""


@dataclass(frozen=True)
class SamplingSettings:
    """How the tokens of one reply are chosen. Temperature 0, or almost 0, takes the likeliest each time."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0 considers all tokens
    min_p: float = 0.0  # least probability of a token, as a share of the likeliest one's
    repetition_penalty: float = 1.0  # on tokens of the reply, as transformers has it
    presence_penalty: float = 0.0  # subtracted from the logit of each token that the reply holds
    frequency_penalty: float = 0.0  # the same, times how often it holds it
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit
    seed: int | None = None  # None draws a fresh one
    num_logprobs: int | None = None  # likeliest tokens to report with each token; None reports nothing


@dataclass(frozen=True)
class NewToken:
    """A token of a reply, with its log-probability before any setting was applied, if that was asked for."""

    id: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()  # ids and log-probabilities, the likeliest first


class Sampler:
    """Chooses the tokens of one reply. Its random numbers are its own: other replies in the batch do not matter.

    Args:
        constraint: tokens that it does not allow are never chosen; it belongs to this reply.

    >>> Sampler(SamplingSettings(logit_bias={0: 5.0})).choose(torch.tensor([0.0, 3.0, 1.0]), []).id
    0
    """

    def __init__(self, settings: SamplingSettings, constraint: Constraint | None = None) -> None:
        self.settings = settings
        self._constraint = constraint
        self._random = torch.Generator()
        if settings.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(settings.seed)

    def choose(self, logits: Tensor, reply: Sequence[int]) -> NewToken:
        """The next token.

        Args:
            logits: float32 [V].
            reply: ids of the tokens chosen so far.
        """
        adjusted = adjust(logits, reply, self.settings)
        if self._constraint is not None:
            adjusted = adjusted.masked_fill(~self._constraint.allowed().to(logits.device), -torch.inf)
        if self.settings.temperature < LEAST_TEMPERATURE:
            token = int(adjusted.argmax())
        else:
            token = self._draw((adjusted - adjusted.max()) / self.settings.temperature)
        if self._constraint is not None:
            self._constraint.accept(token)
        return report(logits, token, self.settings.num_logprobs)

    def _draw(self, logits: Tensor) -> int:
        """A token from logits [V], already divided by the temperature.

        One uniform number for each token, so that rounding differences of the batch next to never change it.
        """
        point = torch.rand((), generator=self._random, dtype=torch.float64)
        probabilities, ids = nucleus(logits, self.settings.top_k, self.settings.top_p)
        if self.settings.min_p:  # the likeliest is always left
            probabilities = probabilities * (probabilities >= self.settings.min_p * probabilities.max())
        edges = probabilities.double().cumsum(0)
        place = int(torch.searchsorted(edges, point.to(edges.device) * edges[-1], right=True))
        place = min(place, len(edges) - 1)
        return place if ids is None else int(ids[place])


def adjust(logits: Tensor, reply: Sequence[int], settings: SamplingSettings) -> Tensor:
    """Logits [V] with penalties and biases; the same tensor if there are none.

    >>> settings = SamplingSettings(presence_penalty=1.0, frequency_penalty=0.5)
    >>> adjust(torch.tensor([4.0, 4.0, 4.0]), [1, 1, 2], settings).tolist()
    [4.0, 2.0, 2.5]
    """
    has_penalty = settings.repetition_penalty != 1 or settings.presence_penalty or settings.frequency_penalty
    if not settings.logit_bias and not (reply and has_penalty):
        return logits
    logits = logits.clone()
    if reply and has_penalty:
        ids, counts = torch.tensor(reply, device=logits.device).unique(return_counts=True)
        said = logits[ids]
        said = torch.where(said > 0, said / settings.repetition_penalty, said * settings.repetition_penalty)
        logits[ids] = said - settings.presence_penalty - settings.frequency_penalty * counts
    for token, bias in settings.logit_bias.items():
        logits[token] += bias
    return logits


def nucleus(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor | None]:
    """The tokens to draw from, of logits [V].

    Returns:
        probabilities [k], not yet adding up to 1, and the ids int64 [k] they belong to; None for all, in their order.
        At least one.

    >>> probabilities, ids = nucleus(torch.tensor([0.1, 0.6, 0.3]).log(), top_k=0, top_p=0.7)
    >>> ids.tolist()
    [1, 2]
    """
    if not top_k and top_p >= 1:
        return logits.softmax(-1), None
    if top_k:
        values, ids = logits.topk(min(top_k, len(logits)))
        probabilities = values.softmax(-1)
    else:
        probabilities, ids = logits.softmax(-1).topk(min(_NUCLEUS_TRY, len(logits)))
        if float(probabilities.sum()) < top_p:
            probabilities, ids = logits.softmax(-1).sort(descending=True)
    # a token counts if those before it hold less than top_p
    count = int((probabilities.cumsum(-1) - probabilities < top_p).sum())
    return probabilities[: max(count, 1)], ids[: max(count, 1)]


def report(logits: Tensor, token: int, num_likeliest: int | None) -> NewToken:
    """A chosen token with what was asked for about it. logits: float32 [V], before any setting."""
    if num_likeliest is None:
        return NewToken(token)
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(num_likeliest, len(logprobs)))
    return NewToken(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
