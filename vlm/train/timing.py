"""Where the time of a step goes, measured without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

# parts of a step, in order, and what the log calls them; the rest is evaluation, samples and the loop itself
PHASES = {
    "data": "data",  # waiting for the next micro-batches
    "encode": "encode",  # the encoder's forward; its backward, where it trains, is of the next phase
    "forward_backward": "fwd+bwd",
    "optimizer": "optimizer",  # norm, clipping, update
    "save": "save",
}
ROLLOUTS = "rollouts"  # a phase of runs whose model writes the replies that it learns from


class StepTimer:
    """Seconds per phase: `with timer("data"): ...`. A phase inside another takes its time from that one.

    On a GPU the device's own clock is read through events: a phase then lasts from when the device reaches its
    beginning to when it reaches its end, and nothing waits. Elsewhere it is wall time.

    >>> timer = StepTimer()
    >>> with timer("data"):
    ...     batches = [1, 2]
    >>> list(timer.read())
    ['data']
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._has_events = device is not None and device.type == "cuda"
        self._open: list[tuple[str, Any]] = []  # phases that have begun, the innermost last, each with its trace range
        self._marks: list[tuple[str | None, Any]] = []  # moments, and the phase from then on

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._begin(phase)
        try:
            yield
        finally:
            self._end()

    def watch(self, module: nn.Module, phase: str) -> None:
        """Give the forward passes of a module a phase of their own, wherever they happen within another phase."""

        def begin(*_: Any) -> None:
            if self._open:
                self._begin(phase)

        def end(*_: Any) -> None:
            if self._open and self._open[-1][0] == phase:
                self._end()

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end, always_call=True)

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last call. What a GPU has not reached yet counts in the next one."""
        seconds: dict[str, float] = {}
        while len(self._marks) > 1:
            (phase, start), (_, end) = self._marks[:2]
            if self._has_events and not end.query():
                break
            if phase is not None:
                passed = start.elapsed_time(end) / 1000 if self._has_events else end - start
                seconds[phase] = seconds.get(phase, 0.0) + passed
            del self._marks[0]
        return seconds

    def _begin(self, phase: str) -> None:
        span = record_function(f"step: {phase}")  # for traces; next to free without a profiler
        span.__enter__()
        self._open.append((phase, span))
        self._mark()

    def _end(self) -> None:
        self._open.pop()[1].__exit__(None, None, None)
        self._mark()

    def _mark(self) -> None:
        self._marks.append((self._open[-1][0] if self._open else None, self._now()))

    def _now(self) -> Any:
        if not self._has_events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def describe_shares(seconds: Mapping[str, float], total: float) -> str:
    """For the log.

    >>> describe_shares({"data": 1.0, "forward_backward": 6.0, "optimizer": 1.0}, 10.0)
    'data 10% encode 0% fwd+bwd 60% optimizer 10% save 0%'
    """
    phases = PHASES | ({ROLLOUTS: ROLLOUTS} if ROLLOUTS in seconds else {})
    return " ".join(f"{name} {seconds.get(phase, 0.0) / total:.0%}" for phase, name in phases.items())
