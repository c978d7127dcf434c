"""What the model computes at some tokens of a batch, so that two batches can be compared there.

Where a process holds the whole model, hidden states are compared; else (pipelines, ZeRO, fully_shard) the loss of
those tokens, which every engine can compute. All processes make the same calls.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from vlm.batch import IGNORE_INDEX, Batch
from vlm.models.vlm import VisionLanguageModel
from vlm.train.engines.base import Engine


class Probe(Protocol):
    def difference(self, batch: Batch, at: Tensor, other: Batch, other_at: Tensor) -> float:
        """How much what predicts the tokens `at` of a batch differs from what predicts as many of another one.

        Args:
            at, other_at: bool [B, L], true at the tokens that are predicted; never at a row's first.

        Returns:
            0 for no difference. Of hidden states, the norm of the difference over the norm; of losses, nats per token.
        """


class StateProbe:
    """Compares hidden states. Each batch goes through the model once.

    Args:
        autocast: what the model computes under in training.
    """

    def __init__(
        self, model: VisionLanguageModel, autocast: Callable[[], AbstractContextManager[None]], device: torch.device
    ) -> None:
        self.model = model
        self.autocast = autocast
        self.device = device
        self._known: list[tuple[Batch, Tensor]] = []

    def difference(self, batch: Batch, at: Tensor, other: Batch, other_at: Tensor) -> float:
        """See `Probe`; at, other_at: bool [B, L]."""
        return relative(self._before(batch, at), self._before(other, other_at))

    def keep(self, batch: Batch, states: Tensor) -> None:
        """Hidden states [B, L, D] of a batch that were computed elsewhere."""
        self._known.append((batch, states.detach().float()))

    def states(self, batch: Batch) -> Tensor:
        """[B, L, D], float32."""
        found = next((states for known, states in self._known if known is batch), None)
        if found is None:
            with torch.no_grad():
                found = self.forward(batch).float()
            self._known.append((batch, found))
        return found

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states [B, L, D] as training computes them."""
        moved = batch.to(self.device)
        with self.autocast():
            return self.model(
                moved.input_ids, moved.position_ids, moved.pixel_values, moved.image_features, device=self.device
            )

    def _before(self, batch: Batch, at: Tensor) -> Tensor:
        """Hidden states, float32 [S, D], that predict the tokens `at`, bool [B, L]."""
        return self.states(batch)[:, :-1][at[:, 1:].to(self.device)]


class LossProbe:
    """Compares losses, computed by the engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._known: list[tuple[Batch, Tensor, float]] = []

    def difference(self, batch: Batch, at: Tensor, other: Batch, other_at: Tensor) -> float:
        """See `Probe`; at, other_at: bool [B, L]."""
        targets = other.input_ids[other_at]
        return abs(self._loss(batch, at, targets) - self._loss(other, other_at, targets))

    def _loss(self, batch: Batch, at: Tensor, targets: Tensor) -> float:
        """Nats per token, of predicting `targets` int64 [S] at the places `at`, bool [B, L]."""
        labels = torch.full_like(batch.input_ids, IGNORE_INDEX).masked_scatter(at, targets)
        for known, its_labels, loss in self._known:
            if known is batch and torch.equal(its_labels, labels):
                return loss
        (shared,) = self.engine.broadcast([replace(batch, labels=labels)])
        summed, count = self.engine.evaluate(shared)
        self._known.append((batch, labels, summed / max(1, count)))
        return self._known[-1][2]


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference of two tensors [...] over the norm of `expected`; infinite for two shapes and for NaN."""
    if found.shape != expected.shape or not found.numel():
        return float("inf")
    difference = (found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-12)
    return difference.item() if torch.isfinite(difference) else float("inf")
