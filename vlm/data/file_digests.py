"""Which content an image file has, without reading it again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from vlm.data.shards import NAME, NAMES, DigestTable, halves, read_records, sign, write_all, writer_name
from vlm.errors import RecordError
from vlm.logs import warn


class FileDigests:
    """The digest of each file's content, by path, size, inode and times. Kept, so that no file is read twice for it.

    Args:
        folder: of the tables, which all encoders share.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._table: DigestTable | None = None
        self._new: dict[bytes, bytes] = {}  # digests that were taken in this process, not written yet
        self._path: Path | None = folder / f"{writer_name()}{NAMES}"  # None: it could not be written

    def digest(self, image: str | bytes) -> bytes:
        """16 bytes. Raises RecordError, rules image_missing and image_unreadable."""
        if isinstance(image, bytes):
            return hashlib.sha256(image).digest()[:16]
        name = _identity(image)
        if name in self._new:
            return self._new[name]
        table = self._load()
        for number in table.find(name):
            row = table.rows[number]
            return b"".join(int(row[half]).to_bytes(8, "little") for half in ("content_high", "content_low"))
        self._new[name] = _file_digest(image)
        return self._new[name]

    def keep(self, image: str | bytes) -> None:
        """Write down a digest that was taken in this process. A disk that refuses costs time later, no more."""
        if isinstance(image, bytes) or self._path is None:
            return
        name = _identity(image)
        content = self._new.pop(name, None)
        if content is None:
            return
        record = np.zeros(1, NAME)
        record["high"], record["low"] = halves(name)
        record["content_high"], record["content_low"] = halves(content)
        sign(record)
        self._load().add(record)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
                write_all(file, memoryview(record.tobytes()))  # type: ignore[arg-type]
        except OSError as error:
            self._path = None  # the file may end in half a record
            warn(f"data.cache: cannot write to {self._folder} ({error.strerror}); images are hashed again next time")

    def _load(self) -> DigestTable:
        if self._table is None:
            self._table = DigestTable(NAME)
            for path in sorted(self._folder.glob(f"*{NAMES}")):
                self._table.add(read_records(path, NAME)[0])
        return self._table


def _identity(path: str) -> bytes:
    """16 bytes that change when the file does, without reading it."""
    try:
        status = os.stat(path)
    except OSError:
        raise RecordError("image_missing", f"{Path(path).name} does not exist") from None
    facts = (path, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).digest()


def _file_digest(path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()[:16]
    except OSError as error:
        raise RecordError("image_unreadable", f"{Path(path).name} cannot be read ({error.strerror})") from None
