"""The size of the feature cache kept below a bound: whole shards go, those that nothing used for longest first."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from filelock import FileLock

from vlm.data.shards import DATA, INDEX

IN_USE_SECONDS = 3600.0  # a shard that was used this recently is kept while some process has its folder open
TOUCH_SECONDS = 300.0  # between two notes of a process that it uses a shard, which are the file's time
_LOCK = "in-use.lock"


class Shard(NamedTuple):
    path: Path  # of its data
    size: int  # bytes, its index included
    used: float  # time of its last use


class FolderInUse:
    """Says to other processes that the shards of a folder are in use, until this process ends."""

    def __init__(self, folder: Path) -> None:
        with suppress(OSError):  # a folder that cannot be written is not evicted from either
            self._file = (folder / _LOCK).open("ab")
            _lock(self._file, shared=True)


def make_room(root: Path, own: Path, limit: int, needed: int) -> int:
    """Remove shards until `needed` more bytes fit below `limit`.

    Shards of other encoders go first, then those of this one; never one that a running process uses.

    Args:
        root: the cache, a folder for each encoder.
        own: the folder of the encoder that needs room.

    Returns:
        the bytes that are still free below the limit, the needed ones included; less than `needed` if all the rest is
        in use.
    """
    free = limit - sum(shard.size for shard in _shards(root))
    if free >= needed:
        return free
    with FileLock(root / "eviction.lock"):  # else two processes remove twice as much as is needed
        shards = list(_shards(root))
        free = limit - sum(shard.size for shard in shards)
        for shard in _evictable(shards, own):
            if free >= needed:
                break
            for suffix in (INDEX, DATA):  # a reader that sees no record looks for no bytes
                shard.path.with_suffix(suffix).unlink(missing_ok=True)
            free += shard.size
    return free


def room(root: Path, own: Path, limit: int) -> int:
    """Bytes that could be written below the limit, if what is not in use is removed."""
    shards = list(_shards(root))
    return limit - sum(shard.size for shard in shards) + sum(shard.size for shard in _evictable(shards, own))


def touch(shard: str) -> None:
    """Note that a shard is in use."""
    with suppress(OSError):  # removed, or of another user
        os.utime(shard + DATA)


def _evictable(shards: list[Shard], own: Path) -> list[Shard]:
    now = time.time()
    open_folders = {folder for folder in {shard.path.parent for shard in shards} if folder == own or _is_open(folder)}
    idle = [shard for shard in shards if shard.path.parent not in open_folders or now - shard.used > IN_USE_SECONDS]
    return sorted(idle, key=lambda shard: (shard.path.parent == own, shard.used))


def _shards(root: Path) -> Iterator[Shard]:
    for path in root.glob(f"*/*{DATA}"):
        try:
            status, index = path.stat(), path.with_suffix(INDEX)
            yield Shard(path, status.st_size + (index.stat().st_size if index.exists() else 0), status.st_mtime)
        except FileNotFoundError:  # removed meanwhile
            continue


def _is_open(folder: Path) -> bool:
    """Does a process have the folder open? True where that cannot be asked."""
    try:
        with (folder / _LOCK).open("ab") as file, _locked(file):
            return False
    except OSError:
        return True


@contextmanager
def _locked(file: BinaryIO) -> Iterator[None]:
    _lock(file, shared=False)
    yield


def _lock(file: BinaryIO, *, shared: bool) -> None:
    """Ends with the file. Not shared, it raises OSError where another process holds it."""
    if sys.platform == "win32":
        raise OSError("no shared locks")
    import fcntl

    fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
