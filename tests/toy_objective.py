"""A second objective, which only the tests know: the squared doubt about every second word of the vocabulary."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vlm.batch import IGNORE_INDEX, Batch
from vlm.config import RunConfig
from vlm.models.loss import select_supervised
from vlm.objectives import OBJECTIVES
from vlm.objectives.base import Head, LossOutput, ObjectiveConfig


class EvenWords:
    metric_names = ("accuracy", "doubt")

    def __init__(self, power: float) -> None:
        self.power = power

    def normalizer(self, batch: Batch) -> int:
        return int(_is_scored(batch.labels[:, 1:]).sum())

    def num_head_calls(self, batch: Batch) -> int:
        return 1 + self.normalizer(batch) % 3  # the ranks differ

    def reads(self, batch: Batch) -> Tensor | None:
        return None  # all

    def loss(self, hidden_states: Tensor, batch: Batch, head: Head) -> LossOutput:
        states, targets = select_supervised(hidden_states, batch.labels, batch.position_ids)
        at = _is_scored(targets)
        states, targets = states[at], targets[at]
        calls = max(head.min_calls, self.num_head_calls(batch))
        logits = torch.cat([head(part) for part in torch.tensor_split(states, calls)]).float()
        doubt = 1 - logits.softmax(-1).gather(1, targets[:, None])[:, 0]
        right = (logits.argmax(-1) == targets).float()
        return LossOutput((doubt**self.power).sum(), {"accuracy": right.sum(), "doubt": doubt.detach().sum()})


class EvenWordsConfig(ObjectiveConfig):
    kind: Literal["even_words"] = "even_words"
    power: float = 2.0

    def build(self) -> EvenWords:
        return EvenWords(self.power)


def register() -> None:
    """What a line in `OBJECTIVES` does, for this process."""
    OBJECTIVES["even_words"] = EvenWordsConfig
    RunConfig.model_rebuild(force=True)


def unregister() -> None:
    del OBJECTIVES["even_words"]
    RunConfig.model_rebuild(force=True)


def _is_scored(targets: Tensor) -> Tensor:
    return (targets != IGNORE_INDEX) & (torch.remainder(targets, 2) == 0)
