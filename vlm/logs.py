"""Console lines, from the logging rank only. A live line at the bottom when the console is a terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

from vlm.launch import launched_rank

LEVELS = ("info", "warning", "error")
PROGRESS_SECONDS = 15.0  # between the lines of a log file; a terminal has a live line instead
_least = 0  # place in LEVELS of what is shown
_live = ""  # the live line on screen now; rewritten after every ordinary line
_copy: TextIO | None = None  # where every line goes too


def is_logging_rank() -> bool:
    """True on the one process of a launch that prints."""
    return launched_rank() == 0


@contextmanager
def log_level(name: str) -> Iterator[None]:
    """Within the block, show lines of this level and those after it in LEVELS. Errors are printed by `vlm.cli`."""
    global _least
    before, _least = _least, LEVELS.index(name)
    try:
        yield
    finally:
        _least = before


@contextmanager
def copied_to(path: Path) -> Iterator[None]:
    """Within the block, lines are added to a file too, unless standard error is that file. What cannot be written is
    left out."""
    global _copy
    if not is_logging_rank() or _is_stderr(path):
        yield
        return
    with path.open("a", encoding="utf-8") as file:
        before, _copy = _copy, file
        try:
            yield
        finally:
            _copy = before


def log(message: str, level: str = "info") -> None:
    """Print a line on standard error, above the live line if there is one."""
    if is_logging_rank() and LEVELS.index(level) >= _least:
        erase = "\r\033[K" if _live else ""
        sys.stderr.write(f"{erase}{message}\n{_live}")
        sys.stderr.flush()
        if _copy is not None:
            with suppress(OSError):  # a full disk costs the line, not the run
                _copy.write(f"{message}\n")
                _copy.flush()


def warn(message: str) -> None:
    log(f"warning: {message}", "warning")


def live(line: str) -> None:
    """Replace the live line; an empty one ends it. Does nothing when standard error is no terminal."""
    global _live
    if _least or not is_logging_rank() or not sys.stderr.isatty():
        return
    width = _columns()
    _live = line if len(line) < width else line[: width - 1]
    sys.stderr.write(f"\r\033[K{_live}")
    sys.stderr.flush()


class Progress:
    """Tells how far something is: a live line on a terminal, else a line every PROGRESS_SECONDS.

    A context manager; when it took that long or longer, the last line says how long.

    Args:
        what: begins the lines, e.g. "data: encoded".
        total: how many there are.
        unit: of what; "bytes" are shown in GiB.
        done: how many were done before; they say nothing of the time that the others take.
        tells_rate: say how many are done per second.
    """

    def __init__(self, what: str, total: int, unit: str, *, done: int = 0, tells_rate: bool = False) -> None:
        self.what = what
        self.total = total
        self.unit = unit
        self._done_before = done
        self._tells_rate = tells_rate
        self._started = self._told = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def show(self, done: int) -> None:
        """`done` of the total so far. Cheap enough to call for every one."""
        now = time.monotonic()
        is_terminal = sys.stderr.isatty()
        if not is_terminal and now - self._told < PROGRESS_SECONDS:
            return
        each = (now - self._started) / max(done - self._done_before, 1)
        rate = f", {1 / each:,.1f} {self._unit}/s" if self._tells_rate else ""
        left = format_seconds(each * (self.total - done))
        line = f"{self.what} {self._count(done)} of {self._count(self.total)} {self._unit}{rate}, {left} left"
        if is_terminal:
            live(line)
        else:
            self._told = now
            log(line)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        live("")
        if kind is None and self.seconds >= PROGRESS_SECONDS:
            log(f"{self.what} {self._count(self.total)} {self._unit} in {format_seconds(self.seconds)}")

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._started

    @property
    def _unit(self) -> str:
        return "GiB" if self.unit == "bytes" else self.unit

    def _count(self, number: int) -> str:
        return f"{number / 2**30:.1f}" if self.unit == "bytes" else f"{number:,}"


def format_seconds(seconds: float) -> str:
    """
    >>> format_seconds(75), format_seconds(3700)
    ('1m15s', '1h01m')
    """
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _is_stderr(path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(sys.stderr.fileno()), path.stat())
    except (OSError, ValueError):  # there is no such file, or standard error is none
        return False


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:  # a terminal that does not tell its size
        return 120
