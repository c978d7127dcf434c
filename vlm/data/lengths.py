"""Arrays in the cache that a run maps at its start: the table of a scan, the rows of an epoch."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np

from vlm.files import replacing
from vlm.logs import warn


def load_array(path: Path, what: str) -> tuple[np.ndarray, str] | None:
    """A stored int64 array, read-only, and the text stored with it; None if there is none or it is damaged.

    Args:
        what: is done again where it is damaged, for the warning.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        with path.open("rb") as file:
            file.seek(array.offset + array.nbytes)
            behind = json.loads(file.read())
        if behind["crc32"] != _sum(array, behind["text"]):
            raise ValueError("its sum differs")
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError) as error:
        warn(f"data.cache: {path.parent.name}/{path.name} is damaged ({error}); {what} again")
        return None
    return (array, str(behind["text"])) if array.dtype == np.int64 else None


def store_array(path: Path, array: np.ndarray, what: str, text: str = "") -> None:
    """A cache that cannot be written costs time, not the run."""
    try:
        with replacing(path) as temporary, temporary.open("xb") as file:
            np.save(file, array)
            file.write(json.dumps({"text": text, "crc32": _sum(array, text)}).encode())
    except OSError as error:
        warn(f"data.cache: cannot write to {path.parent} ({error.strerror}); {what} again next time")


def _sum(array: np.ndarray, text: str) -> int:
    return zlib.crc32(text.encode(), zlib.crc32(np.ascontiguousarray(array).data))
