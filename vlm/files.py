"""Files that a reader sees whole or not at all, and their sums."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(final: Path, *, make_folder: bool = True) -> Iterator[Path]:
    """Give a temporary sibling to write; it takes the place of `final` when the block ends well, else it is removed.

    Its name keeps the suffix, which some writers look at. What is written is not flushed: after a
    power failure a cache may be damaged, and whoever reads it looks. Raises OSError.
    """
    if make_folder:
        final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".tmp-{secrets.token_hex(4)}{final.suffix}")
    try:
        yield temporary
        temporary.replace(final)
    finally:
        with suppress(OSError):  # its folder may be what is missing
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file, flushed, so that a reader sees the old or the new content. Raises OSError."""
    with replacing(path, make_folder=False) as temporary:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
    flush(path.parent)


def flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """All that lies below a folder."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
