"""SIGTERM and Ctrl-C as a request: finish the step, save once, leave."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from vlm.logs import log


class StopRequest:
    """Context manager that turns SIGTERM and SIGINT into a flag.

    Further signals change nothing, so a save is never nested.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first = self.signal_name is None
        self.signal_name = signal.Signals(number).name
        if first:
            log(f"{self.signal_name}: finishing this step, then saving")
