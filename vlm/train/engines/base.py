"""The one interface between the loop and any way of spreading a model over processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from vlm.batch import Batch


@dataclass(frozen=True)
class StepOutput:
    """What one optimizer step did."""

    loss: float  # mean over the step's weight and all data ranks: nats per supervised token
    grad_norm: float  # before clipping, over all trained weights
    applied: bool  # false when loss or gradient norm was not finite: the weights are as before


class Engine(Protocol):
    """One call of `train_step` is one optimizer step."""

    data_rank: int  # which share of the stream this process takes
    num_data_ranks: int

    def train_step(self, microbatches: list[Batch], weight: float, learning_rate: float) -> StepOutput:
        """Forward and backward over the micro-batches, clip, update. `weight` divides the summed loss."""

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """Summed loss and weight over all data ranks, without a gradient."""

    def sum_over_data_ranks(self, value: float) -> float: ...

    def save(self, folder: Path) -> None:
        """Write weights.safetensors (canonical names) and engine/ below `folder`, safetensors and JSON only."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; exact. Raises CheckpointError naming each tensor that does not fit."""

    def trained_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical name and tensor of everything that trains, for export."""
