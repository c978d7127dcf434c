"""The files of the feature cache: each is appended to by one process, and read by all.

    <writer>-0000.data   the bytes of entries, one after the other, each from a multiple of 64 on
    <writer>-0000.index  a record (`ENTRY`) for each of them, written after its bytes
    <writer>.names       a record (`NAME`) for each image file whose content is known

A writer is named by machine, process and chance, so no two share a file and none is locked. A writer that was killed
leaves an entry without a record, or half a record: both are passed over. The last four bytes of a record are a sum of
the others, and a record holds the sum of its entry, so whatever is damaged counts as absent.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import zlib
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

DIGEST = [("high", "<u8"), ("low", "<u8")]  # the 16 bytes by which a record is found
ENTRY = np.dtype(
    [*DIGEST, ("offset", "<u8"), ("tiles", "<u4"), ("patches", "<u4"), ("width", "<u4"), ("dtype", "<u4"),
     ("checksum", "<u4"), ("check", "<u4")]
)  # fmt: skip
NAME = np.dtype([*DIGEST, ("content_high", "<u8"), ("content_low", "<u8"), ("reserved", "<u4"), ("check", "<u4")])
DATA, INDEX, NAMES = ".data", ".index", ".names"
SHARD_BYTES = 2**30
_ALIGNMENT = 64
_MULTIPLIERS = np.arange(1, 64, 2, dtype=np.uint32) * np.uint32(0x9E3779B1)  # odd: any changed word changes the sum
_START = np.uint32(0x5EED)  # a record of zeros is not valid


class Entry(NamedTuple):
    """Where an entry was written: the shard's path without suffix, and its record, an array [1] of `ENTRY`."""

    shard: str
    place: int  # of the record in the index, counted from 0
    record: np.ndarray


class ShardWriter:
    """Appends entries to shards of its own in `folder`, made when the first one comes.

    Args:
        shard_bytes: a shard that has reached this size gets no more entries.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.process = os.getpid()  # a forked process has to open its own
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._name = writer_name()
        self._number = 0
        self._files: tuple[BinaryIO, BinaryIO] | None = None
        self._size = self._count = 0

    def append(self, digest: bytes, shape: tuple[int, int, int], dtype: int, content: memoryview) -> Entry:
        """Write the bytes, then the record. Raises OSError when the disk refuses; nothing is then recorded."""
        if self._files is not None and self._size >= self._shard_bytes:
            self.close()
        data, index = self._files or self._open()
        record = np.zeros(1, ENTRY)
        record["high"], record["low"] = halves(digest)
        record["offset"] = offset = -(-self._size // _ALIGNMENT) * _ALIGNMENT
        record["tiles"], record["patches"], record["width"] = shape
        record["dtype"], record["checksum"] = dtype, zlib.crc32(content)
        sign(record)
        try:
            write_all(data, memoryview(bytes(offset - self._size)))
            write_all(data, content)
            write_all(index, memoryview(record.tobytes()))
        except OSError:
            self.close()  # what was half written ends this shard
            raise
        self._size = offset + len(content)
        self._count += 1
        return Entry(self._stem, self._count - 1, record)

    def close(self) -> None:
        for file in self._files or ():
            with suppress(OSError):
                file.close()
        if self._files is not None:
            self._number += 1
        self._files = None

    @property
    def _stem(self) -> str:
        return str(self._folder / f"{self._name}-{self._number:04d}")

    def _open(self) -> tuple[BinaryIO, BinaryIO]:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._size = self._count = 0
        data = open(self._stem + DATA, "xb", buffering=0)  # noqa: SIM115  kept open
        self._files = data, open(self._stem + INDEX, "xb", buffering=0)  # noqa: SIM115
        return self._files


def writer_name() -> str:
    """Of the files of this process; no other has the same."""
    host = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname())[:40]
    return f"{host}-{os.getpid()}-{secrets.token_hex(4)}"


def write_all(file: BinaryIO, content: memoryview) -> None:
    """An unbuffered file may take only a part at a time."""
    while len(content):
        content = content[file.write(content) :]


def halves(digest: bytes) -> tuple[int, int]:
    """The 16 bytes of a digest as the two numbers that stand in a record."""
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def sign(records: np.ndarray) -> None:
    """Put the sum of the other bytes into `check`."""
    records["check"] = _sums(records)


def read_records(path: Path, dtype: np.dtype, start: int = 0) -> tuple[np.ndarray, np.ndarray, int]:
    """The valid records of an index from record `start` on.

    Returns:
        the records, the place of each in the file, and how many records there are, valid or not. Half a record at the
        end, of a writer that is at work or was killed, is not one.
    """
    content = np.fromfile(path, np.uint8, offset=start * dtype.itemsize)
    records = content[: len(content) // dtype.itemsize * dtype.itemsize].view(dtype)
    valid = records["check"] == _sums(records)
    return records[valid], start + np.flatnonzero(valid), start + len(records)


def strike_out(shard: str, place: int, check: int) -> None:
    """Make a record invalid, so that no reader finds its entry again. Without right to write, nothing happens.

    Args:
        check: of the record while it was valid; struck out twice it stays invalid.
    """
    with suppress(OSError), open(shard + INDEX, "r+b", buffering=0) as index:
        index.seek((place + 1) * ENTRY.itemsize - 4)
        index.write((check ^ 0xFFFFFFFF).to_bytes(4, "little"))


class DigestTable:
    """Rows of a structured array found by digest. Grows; a row keeps its number.

    Most rows are found by bisection among sorted ones, which takes 16 bytes a row; those that came last by a dict.
    """

    def __init__(self, dtype: np.dtype) -> None:
        self.rows = np.zeros(0, dtype)
        self._count = 0
        self._sorted = np.zeros(0, np.uint64)  # the first halves of the digests, in order
        self._order = np.zeros(0, np.int64)  # the row of each
        self._recent: dict[tuple[int, int], list[int]] = {}

    def __len__(self) -> int:
        return self._count

    def add(self, rows: np.ndarray) -> None:
        start, self._count = self._count, self._count + len(rows)
        if self._count > len(self.rows):
            grown = np.zeros(max(self._count, 2 * len(self.rows), 1024), self.rows.dtype)
            grown[:start] = self.rows[:start]
            self.rows = grown
        self.rows[start : self._count] = rows
        if self._count - len(self._order) > max(4096, len(self._order) // 8):
            self._order = np.argsort(self.rows["high"][: self._count], kind="stable")
            self._sorted = self.rows["high"][self._order]
            self._recent.clear()
            return
        for number, high, low in zip(
            range(start, self._count), rows["high"].tolist(), rows["low"].tolist(), strict=True
        ):
            self._recent.setdefault((high, low), []).append(number)

    def find(self, digest: bytes) -> list[int]:
        """Numbers of the rows with this digest, those that came last first."""
        high, low = halves(digest)
        found = []
        place = int(np.searchsorted(self._sorted, np.uint64(high)))
        while place < len(self._sorted) and int(self._sorted[place]) == high:
            number = int(self._order[place])
            if int(self.rows["low"][number]) == low:
                found.append(number)
            place += 1
        return (found + self._recent.get((high, low), []))[::-1]


def _sums(records: np.ndarray) -> np.ndarray:
    """uint32 [n]: of all words of each record but the last."""
    words = np.ascontiguousarray(records).view("<u4").reshape(len(records), records.dtype.itemsize // 4)[:, :-1]
    return (words * _MULTIPLIERS[: words.shape[1]]).sum(axis=1, dtype=np.uint32) + _START
