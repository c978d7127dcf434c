"""Held-out loss during training."""

from __future__ import annotations

from collections.abc import Iterable

from vlm.batch import Batch
from vlm.train.engines.base import Engine


def held_out_loss(engine: Engine, batches: Iterable[Batch]) -> tuple[float, int]:
    """Mean loss per supervised token over all batches, each token counted equally, and the number of tokens."""
    total, weight = 0.0, 0
    for batch in batches:
        summed, count = engine.evaluate(batch)
        total += summed
        weight += count
    return total / max(weight, 1), weight
