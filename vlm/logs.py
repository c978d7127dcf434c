"""Console lines, from the logging rank only. A live line at the bottom when the console is a terminal."""

from __future__ import annotations

import os
import sys

_live = ""  # the live line on screen now; rewritten after every ordinary line


def is_logging_rank() -> bool:
    """True on the one process of a launch that prints (torchrun sets RANK)."""
    return os.environ.get("RANK", "0") == "0"


def log(message: str) -> None:
    """Print a line on standard error, above the live line if there is one."""
    if is_logging_rank():
        erase = "\r\033[K" if _live else ""
        sys.stderr.write(f"{erase}{message}\n{_live}")
        sys.stderr.flush()


def warn(message: str) -> None:
    log(f"warning: {message}")


def live(line: str) -> None:
    """Replace the live line; an empty one ends it. Does nothing when standard error is no terminal."""
    global _live
    if not is_logging_rank() or not sys.stderr.isatty():
        return
    width = _columns()
    _live = line if len(line) < width else line[: width - 1]
    sys.stderr.write(f"\r\033[K{_live}")
    sys.stderr.flush()


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:  # a terminal that does not tell its size
        return 120
