"""What a user types where an image is asked for: paths, or something else."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from urllib.parse import unquote, urlparse

_QUOTES = "'\"“”‘’"


def image_paths(text: str) -> list[str]:
    """One path, which may hold blanks, or several, quoted or escaped as in a shell; `~` and file:// are understood.

    >>> image_paths("'my cat.png'"), image_paths("file:///a/my%20cat.png")
    (['my cat.png'], ['/a/my cat.png'])
    """
    whole = _clean(text)
    if is_file(whole):
        return [whole]
    try:
        parts = [_clean(part) for part in shlex.split(text)]
    except ValueError:  # a quote that is not closed
        return [whole]
    return parts if any(is_file(part) for part in parts) else [whole]


def looks_like_path(text: str) -> bool:
    """Whether a line that names no file is a mistyped path, or else a question.

    >>> [looks_like_path(text) for text in ("~/cat.pgn", "my cat.png", "cat.jpeg", "C:\\\\cat.png", "https://a/b.png")]
    [True, True, True, True, True]
    >>> [looks_like_path(text) for text in ("Hello", "What is version 1.5?", "and/or?", "这是什么？", "Really...")]
    [False, False, False, False, False]
    """
    text = _clean(text)
    has_suffix = re.search(r"[^\s.]\.(?!\d+$)[A-Za-z0-9]{2,5}$", text) is not None
    return has_suffix or re.match(r"(/|~|\.{1,2}/|[A-Za-z]:\\|\w+://)\S", text) is not None


def _clean(text: str) -> str:
    text = text.strip()
    if len(text) > 1 and text[0] in _QUOTES and text[-1] in _QUOTES:
        text = text[1:-1]
    if text.startswith("file://"):
        text = unquote(urlparse(text).path)
    try:
        return str(Path(text).expanduser())
    except RuntimeError:  # ~nobody
        return text


def is_file(text: str) -> bool:
    """As `Path.is_file`, for any text."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long, or with a NUL
        return False
