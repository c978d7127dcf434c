"""Held-out loss during training."""

from __future__ import annotations

from collections.abc import Iterable

from vlm.batch import Batch, Skip
from vlm.train.engines.base import Engine


def held_out_loss(engine: Engine, batches: Iterable[Batch]) -> tuple[float, int, list[Skip]]:
    """Summed loss over all batches; the normalizer; the records of all data ranks that could not be read."""
    total, normalizer = 0.0, 0
    own: list[Skip] = []
    for read in batches:
        (batch,) = engine.broadcast([read])
        summed, count = engine.evaluate(batch)
        total += summed
        normalizer += count
        own += batch.skipped
    skips = [skip for each in engine.gather_from_data_ranks(own) for skip in each]
    return total, normalizer, skips
