"""A cache of frozen-encoder features on disk, found by the content of the image file.

A file that is replaced or edited has other content and so another entry: features never go stale. What produced them
(encoder, weights, image size, normalisation, number type) is the caller's `key`.
"""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm.data.eviction import TOUCH_SECONDS, FolderInUse, make_room, touch
from vlm.data.file_digests import FileDigests
from vlm.data.shards import (
    DATA,
    ENTRY,
    INDEX,
    SHARD_BYTES,
    DigestTable,
    Entry,
    ShardWriter,
    read_records,
    strike_out,
)
from vlm.errors import DataError
from vlm.logs import warn

_DTYPES = (torch.float32, torch.bfloat16)  # by the number that stands in a record; only ever added to
_UNREAD, _VERIFIED, _LOST = range(3)  # what this process knows of an entry
_ROW = np.dtype(
    [*((name, ENTRY[name]) for name in ENTRY.names or ()), ("shard", "<u4"), ("place", "<u8"), ("state", "u1")]
)
_REFRESH_SECONDS = 1.0  # between two looks for entries of other processes
_SMALL_SHARE = 64  # a writer may use this part of the room below the bound before it asks again: others write too


class FeatureStore:
    """Features per image in the shards below `folder / key`, see `vlm.data.shards`.

    Any number of processes may read and write at once. Can be sent to another process, which reads the index again.

    Args:
        folder: of the caches of all encoders.
        dtype: that features are kept in, whatever they were computed in.
        limit_bytes: bound of all that `folder` holds; shards that were not used for longest are removed to keep it.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        dtype: torch.dtype = torch.bfloat16,
        limit_bytes: int | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.folder = folder
        self.key = key
        self.dtype = dtype
        self.limit_bytes = limit_bytes
        self.shard_bytes = shard_bytes if limit_bytes is None else min(shard_bytes, limit_bytes // 16 + 1)
        self._files = FileDigests(folder / "names")
        self._table = DigestTable(_ROW)
        self._shards: list[str] = []  # paths without suffix
        self._numbers: dict[str, int] = {}  # of the shards, by path
        self._num_read: dict[str, int] = {}  # records of each index that are in the table
        self._maps: dict[int, Tensor] = {}  # uint8, by number of the shard
        self._used: dict[int, float] = {}  # when this process last said so
        self._writer: ShardWriter | None = None
        self._in_use: FolderInUse | None = None
        self._allowance = 0  # bytes that may be written before the bound is looked at again
        self._refreshed = self._kept = float("-inf")

    def __getstate__(self) -> dict[str, Any]:
        names = ("folder", "key", "dtype", "limit_bytes", "shard_bytes")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def path(self) -> Path:
        """The folder of this encoder's shards."""
        return self.folder / self.key

    def get(self, image: str | bytes) -> Tensor | None:
        """The features of an image, [tiles, P, C], or None when they are not there or damaged.

        They lie in the mapped file: do not change them. Their sum is compared the first time that they are read.

        Raises:
            RecordError: rule image_missing.
        """
        digest = self._files.digest(image)
        for number in self._find(digest):
            if (features := self._read(number, image)) is not None:
                return features
        return None

    def has(self, image: str | bytes) -> bool:
        """Is there an entry whose bytes are all there? They are not read. It is then kept from eviction.

        Raises:
            RecordError: rules image_missing, image_unreadable.
        """
        for number in self._find(self._files.digest(image)):
            row = self._table.rows[number]
            if row["state"] != _LOST and _size(self._shards[row["shard"]] + DATA) >= int(row["offset"]) + _length(row):
                self._use(int(row["shard"]))
                self._files.keep(image)
                return True
        return False

    def put(self, image: str | bytes, features: Tensor) -> None:
        """Keep features [tiles, P, C].

        Raises:
            OSError: the disk refuses.
            DataError: they do not fit below the bound.
        """
        digest = self._files.digest(image)
        kept = features.detach().to("cpu", self.dtype).contiguous()
        content = kept.view(-1).view(torch.uint8).numpy().data
        if self._in_use is None:
            self.path.mkdir(parents=True, exist_ok=True)
            self.refresh()
        self._reserve(len(content) + 64 + ENTRY.itemsize)
        if self._writer is None or self._writer.process != os.getpid():
            self._writer = ShardWriter(self.path, self.shard_bytes)
        shape = (kept.shape[0], kept.shape[1], kept.shape[2])
        entry = self._writer.append(digest, shape, _DTYPES.index(self.dtype), content)
        self._add(entry)
        self._files.keep(image)

    def close(self) -> None:
        """Close the files that this process writes: over a network, other machines see them whole only then."""
        if self._writer is not None:
            self._writer.close()

    def refresh(self) -> None:
        """Take in what other processes have written since."""
        self._refreshed = time.monotonic()
        if self._in_use is None and self.path.is_dir():
            self._in_use = FolderInUse(self.path)
        try:
            indexes = [entry for entry in os.scandir(self.path) if entry.name.endswith(INDEX)]
        except OSError:  # a cache that is not there is an empty one
            return
        for index in sorted(indexes, key=lambda entry: entry.name):
            shard = index.path.removesuffix(INDEX)
            start = self._num_read.get(shard, 0)
            if _size(index.path) // ENTRY.itemsize <= start:
                continue
            try:
                records, places, self._num_read[shard] = read_records(Path(index.path), ENTRY, start)
            except FileNotFoundError:  # removed meanwhile
                continue
            self._add_rows(shard, records, places)

    def describe(self) -> str:
        """What is there now.

        >>> FeatureStore(Path("nowhere"), "key").describe()
        '0 images, 0.0 GB in nowhere/key'
        """
        self.refresh()
        rows = self._table.rows[: len(self._table)]
        num_images = len(np.unique(rows[["high", "low"]]))
        num_bytes = sum(_size(shard + DATA) for shard in self._shards)
        return f"{num_images:,} images, {num_bytes / 1e9:.1f} GB in {self.path}"

    def _find(self, digest: bytes) -> list[int]:
        found = self._table.find(digest)
        if not found and time.monotonic() - self._refreshed > _REFRESH_SECONDS:
            self.refresh()
            found = self._table.find(digest)
        return found

    def _add(self, entry: Entry) -> None:
        self._num_read[entry.shard] = entry.place + 1
        self._add_rows(entry.shard, entry.record, np.array([entry.place]))
        self._use(self._numbers[entry.shard])

    def _add_rows(self, shard: str, records: np.ndarray, places: np.ndarray) -> None:
        if shard not in self._numbers:
            self._numbers[shard] = len(self._shards)
            self._shards.append(shard)
        rows = np.zeros(len(records), _ROW)
        for name in ENTRY.names or ():
            rows[name] = records[name]
        rows["shard"], rows["place"] = self._numbers[shard], places
        self._table.add(rows)

    def _read(self, number: int, image: str | bytes) -> Tensor | None:
        row = self._table.rows[number]
        if row["state"] == _LOST:
            return None
        shard = int(row["shard"])
        start, stop = int(row["offset"]), int(row["offset"]) + _length(row)
        content = self._map(shard, stop)
        if content is None:  # the shard was removed, or its end is lost
            row["state"] = _LOST
            return None
        content = content[start:stop]
        if row["state"] == _UNREAD:
            if zlib.crc32(content.numpy().data) != row["checksum"]:
                strike_out(self._shards[shard], int(row["place"]), int(row["check"]))
                row["state"] = _LOST
                name = "an image" if isinstance(image, bytes) else Path(image).name
                warn(f"data.cache: the features of {name} are damaged, and made again when a run starts next")
                return None
            row["state"] = _VERIFIED
        self._use(shard)
        shape = (int(row["tiles"]), int(row["patches"]), int(row["width"]))
        return content.view(_DTYPES[int(row["dtype"])]).view(shape)

    def _map(self, shard: int, stop: int) -> Tensor | None:
        """The bytes of a shard, at least `stop` of them. Private to this process, and without a file kept open."""
        mapped = self._maps.get(shard)
        if mapped is None or len(mapped) < stop:
            path = self._shards[shard] + DATA
            size = _size(path)
            if size < stop:
                return None
            try:
                mapped = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
            except RuntimeError:  # removed meanwhile
                return None
            self._maps[shard] = mapped
        return mapped

    def _use(self, shard: int) -> None:
        """Keep a shard from eviction, and from time to time all others that this process uses."""
        now = time.monotonic()
        if shard not in self._used:
            self._used[shard] = now
            touch(self._shards[shard])
        if now - self._kept > TOUCH_SECONDS:
            self._kept = now
            for used in self._used:
                touch(self._shards[used])

    def _reserve(self, needed: int) -> None:
        if self.limit_bytes is None:
            return
        if self._allowance < needed:
            spare = self.limit_bytes // _SMALL_SHARE  # for what others write between their looks
            free = make_room(self.folder, self.path, self.limit_bytes, needed + spare) - spare
            if free < needed:
                raise DataError(
                    f"data.cache_size_gb: the cache in {self.folder} is full at {self.limit_bytes / 1e9:.1f} GB, all "
                    "of it in use, and not all images are encoded. Raise data.cache_size_gb, or set "
                    "data.cache_features to auto or false"
                )
            self._allowance = max(needed, free // _SMALL_SHARE)
        self._allowance -= needed


def encoder_key(encoder: torch.nn.Module, settings: object) -> str:
    """Changes with any weight of the encoder and with `settings`, whose repr counts."""
    state = hashlib.sha256(repr(settings).encode())
    for name, tensor in encoder.state_dict().items():
        state.update(name.encode())
        state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:24]


def _length(row: np.void) -> int:
    itemsize = _DTYPES[int(row["dtype"])].itemsize
    return int(row["tiles"]) * int(row["patches"]) * int(row["width"]) * itemsize


def _size(path: str) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
