"""The table of a scan in the cache: mapped, so that a known data set of any size is there at once."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np

from vlm.data.notes import UnreadLog
from vlm.files import replacing
from vlm.logs import warn


def load_table(path: Path, shape: tuple[int, int]) -> tuple[np.ndarray, UnreadLog] | None:
    """The stored table, int64 of that shape, read-only, and what was not read; None without one that is whole."""
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
        with path.open("rb") as file:
            file.seek(table.offset + table.nbytes)
            behind = json.loads(file.read())
        if behind["crc32"] != _sum(table, behind["unread"]):
            raise ValueError("its sum differs")
        unread = UnreadLog.from_json(behind["unread"])
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError) as error:
        warn(f"data.cache: {path.parent.name}/{path.name} is damaged ({error}); the records are measured again")
        return None
    return (table, unread) if table.shape == shape and table.dtype == np.int64 else None


def store_table(path: Path, table: np.ndarray, unread: UnreadLog) -> None:
    """A cache that cannot be written costs time, not the run."""
    said = unread.to_json()
    try:
        with replacing(path) as temporary, temporary.open("xb") as file:
            np.save(file, table)
            file.write(json.dumps({"unread": said, "crc32": _sum(table, said)}).encode())
    except OSError as error:
        warn(f"data.cache: cannot write to {path.parent} ({error.strerror}); records are measured again next time")


def _sum(table: np.ndarray, unread: str) -> int:
    return zlib.crc32(unread.encode(), zlib.crc32(np.ascontiguousarray(table).data))
