"""Rows of the table: each figure of each task, with what it stands beside."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vlm.evaluation.metrics import Figure


@dataclass(frozen=True)
class Row:
    """One figure of one task."""

    task: str
    kind: str
    metric: str
    own: Figure
    shuffled: Figure | None  # None: fewer than two different images
    blank: Figure | None  # every image white; None: not asked for, or no images
    baseline: float | None
    baseline_name: str  # "majority" (always the most frequent answer), "chance", or "" for losses

    def as_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "kind": self.kind,
            "metric": self.metric,
            "own": _finite(self.own.value),
            "own_standard_error": _finite(self.own.standard_error),
            "shuffled": self.shuffled and _finite(self.shuffled.value),
            "shuffled_standard_error": self.shuffled and _finite(self.shuffled.standard_error),
            "blank": self.blank and _finite(self.blank.value),
            "blank_standard_error": self.blank and _finite(self.blank.standard_error),
            "baseline": self.baseline,
            "baseline_name": self.baseline_name,
            "num_records": self.own.num_records,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
