"""Curves of numbers over steps."""

from __future__ import annotations

from collections.abc import Sequence


def running_mean(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a twentieth of the values."""
    decay = 1 - 1 / max(1, len(values) / 20)
    means: list[float] = []
    for value in values:
        means.append(value if not means else decay * means[-1] + (1 - decay) * value)
    return means
