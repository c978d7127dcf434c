"""Which measurement of a run was the best, and how long ago. The lines of metrics.jsonl say all of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class BestSoFar:
    """
    Args:
        name: of the figure that is followed.
        lower_is_better: as of a loss.

    >>> best = BestSoFar("held_out_loss", lower_is_better=True)
    >>> [best.add(step, loss) for step, loss in ((10, 2.0), (20, 1.5), (30, 1.6), (40, 1.5))]
    [True, True, False, False]
    >>> best.step, best.value, best.num_since
    (20, 1.5, 2)
    """

    name: str
    lower_is_better: bool
    step: int | None = None
    value: float | None = None
    num_since: int = 0  # measurements after it

    def add(self, step: int, value: float) -> bool:
        """Whether it is better than all before. NaN is not."""
        sign = -1 if self.lower_is_better else 1
        if value == value and (self.value is None or sign * value > sign * self.value):
            self.step, self.value, self.num_since = step, value, 0
            return True
        self.num_since += 1
        return False

    def add_lines(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """What was measured before, of metrics.jsonl."""
        for line in lines:
            if self.name in line:
                value = line[self.name]
                self.add(line["step"], float("nan") if value is None else value)
