"""Held-out loss during training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vlm.batch import Batch, Skip
from vlm.train.engines.base import Engine


@dataclass(frozen=True)
class Sums:
    """Over held-out records."""

    values: list[float]  # the loss, then the objective's metrics in the order of their names
    normalizer: int

    def __add__(self, other: Sums) -> Sums:
        values = [own + more for own, more in zip(self.values, other.values, strict=True)]
        return Sums(values, self.normalizer + other.normalizer)


def held_out_sums(engine: Engine, batches: Iterable[Batch]) -> tuple[Sums, list[Skip]]:
    """Over all batches; and the records of all data ranks that could not be read."""
    total = Sums([0.0] * (1 + len(engine.objective.metric_names)), 0)
    own: list[Skip] = []
    for read in batches:
        (batch,) = engine.broadcast([read])
        total += Sums(*engine.evaluate_sums(batch))
        own += batch.skipped
    skips = [skip for each in engine.gather_from_data_ranks(own) for skip in each]
    return total, skips
