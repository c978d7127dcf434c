"""What every kind of data file answers."""

from __future__ import annotations

from typing import Any, Protocol


class Source(Protocol):
    """Records by number, from 0. Sent to worker processes, so it can be pickled and opens its files again there."""

    name: str  # for messages

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> dict[str, Any]:
        """A record as the file has it. Raises RecordError: it cannot be read; it is then skipped by that rule."""

    def where(self, number: int) -> str:
        """File and record, for people."""

    def fingerprint(self) -> str:
        """Changes when the file is edited or replaced; quick."""

    def content_digest(self) -> str:
        """Changes with any byte; a resumed run compares it."""
