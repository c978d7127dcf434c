"""Examples as the scan tokenized them, kept in files of the cache, so that epochs read numbers and not text.

A scanning process appends to a shard of its own; nothing that stands in one is changed. An example is found by its
place: the shard's number and the first byte in it. What is read is compared with a sum, so a torn or damaged entry is
as good as none.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from array import array
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlm.batch import IGNORE_INDEX, Example
from vlm.data.conversation import Conversation
from vlm.logs import warn

_COUNTS = struct.Struct("<6i")  # number, tokens kept, runs of placeholders, of labels, bytes of text, images
_HEADER = _COUNTS.size + 4  # bytes: the counts and a sum
_START = b"vlmtok1\n"  # begins a shard, so that no place is 0
_SHARD_BITS = 40  # of a place: above these the shard's number, below them the byte
_GUESS = 2048  # bytes read at once: a caption or a short conversation is shorter


@dataclass(frozen=True)
class KeptExample:
    """An example without what is read from its record's source."""

    input_ids: list[int]
    labels: list[int]
    num_images: int
    names: tuple[str, ...] | None  # of the images, as the record names them; None where the record embeds one
    unread: tuple[str, ...]


class ExampleStore:
    """Shards of one scan. Cheap to send to other processes: each opens its files again, and writes its own shard.

    Args:
        folder: of the shards; made with the first one.
        image_token_id: placeholders are kept as runs, so an image of hundreds of them takes 8 bytes.
    """

    def __init__(self, folder: Path, image_token_id: int | None) -> None:
        self.folder = folder
        self.image_token_id = image_token_id
        self._files: dict[int, int] = {}  # shard -> descriptor, for reading
        self._writer: _Shard | None = None
        self._is_broken = False  # writing failed in this process: it goes on without
        self._has_told = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_writer": None}

    def add(self, entries: list[bytes]) -> np.ndarray:
        """Append some `pack_example`; returns the place of each, int64, 0 where they could not be written."""
        sizes = np.array([0, *map(len, entries)], dtype=np.int64)
        nowhere = np.zeros(len(entries), dtype=np.int64)
        if self._is_broken or not entries:
            return nowhere
        try:
            if self._writer is None:
                self._writer = _Shard.create(self.folder)
            start = self._writer.append(b"".join(entries))
        except OSError as error:
            self._is_broken = True
            warn(
                f"data.cache: cannot write to {self.folder} ({error.strerror}); records are tokenized as they are read"
            )
            return nowhere
        return (self._writer.number << _SHARD_BITS) + start + np.cumsum(sizes)[:-1]

    def read(self, place: int, number: int) -> KeptExample | None:
        """Record `number`, which stands at `place`; None where it does not, or is damaged."""
        shard, start = place >> _SHARD_BITS, place & ((1 << _SHARD_BITS) - 1)
        try:
            if shard not in self._files:
                self._files[shard] = os.open(_path(self.folder, shard), os.O_RDONLY)
            # pread: a map of a file that is cut off would end the process
            kept = unpack_example(_read_entry(self._files[shard], start), number, self.image_token_id)
        except OSError:
            kept = None
        if kept is None and not self._has_told:
            self._has_told = True
            warn(f"data.cache: {_path(self.folder, shard)} is damaged; its records are tokenized as they are read")
        return kept

    def holds(self, places: np.ndarray) -> bool:
        """Whether the shards of all places are there and long enough, by their sizes; warns of one that is not."""
        shards, starts = places >> _SHARD_BITS, places & ((1 << _SHARD_BITS) - 1)
        for shard in np.unique(shards[places > 0]).tolist():
            path = _path(self.folder, shard)
            if not path.is_file() or path.stat().st_size <= starts[shards == shard].max():
                warn(f"data.cache: {path} is missing or cut off; the records are measured again")
                return False
        return True


class _Shard:
    """One file that this process appends to."""

    def __init__(self, number: int, descriptor: int) -> None:
        self.number = number
        self._descriptor = descriptor
        self._size = 0

    @staticmethod
    def create(folder: Path) -> _Shard:
        """The first number that no file has, also of processes that begin at the same time."""
        folder.mkdir(parents=True, exist_ok=True)
        number = sum(1 for _ in folder.glob("*.tokens"))
        while True:
            try:
                descriptor = os.open(_path(folder, number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                number += 1
                continue
            shard = _Shard(number, descriptor)
            shard.append(_START)
            return shard

    def append(self, content: bytes) -> int:
        """Returns where the content begins. Raises OSError."""
        start, left = self._size, memoryview(content)
        while left:
            left = left[os.write(self._descriptor, left) :]
        self._size += len(content)
        return start

    def __del__(self) -> None:
        os.close(self._descriptor)


class Runs(NamedTuple):
    """An example's ids and labels, what repeats counted: where each run begins and one past where it ends."""

    kept: array[int]  # "i": ids without placeholders
    images: list[int]  # runs of placeholders, in the whole example
    learned: list[int]  # runs of labels
    length: int  # of the whole example

    @property
    def num_supervised(self) -> int:
        return sum(self.learned[1::2]) - sum(self.learned[::2])


class Kept(NamedTuple):
    """What is kept of an example."""

    runs: Runs
    images: tuple[str | bytes, ...]  # as in `Example`
    names: tuple[str, ...] | None  # as its record names them; None where it embeds one
    unread: tuple[str, ...]


def keep(example: Example, names: tuple[str, ...] | None, image_token_id: int | None) -> Kept:
    """
    Args:
        names: of its images, as in `Kept`.
        image_token_id: of placeholders; None for a model without images.
    """
    ids = example.input_ids
    images = [] if image_token_id is None else _runs(ids, image_token_id)
    kept, position = array("i"), 0
    for start, end in zip(images[::2], images[1::2], strict=True):
        kept.extend(ids[position:start])
        position = end
    kept.extend(ids[position:])
    runs = Runs(kept, images, _learned_runs(example.labels), len(ids))
    return Kept(runs, example.images, names, example.unread)


def pack_example(number: int, example: Kept) -> bytes:
    """As bytes: ids without placeholders, runs of placeholders, runs of labels, names and unread keys."""
    kept, images, learned, _ = example.runs
    text = b"" if example.names == () and not example.unread else _pack_texts(example.names, example.unread)
    text += b" " * (-len(text) % 4)
    counts = _COUNTS.pack(number, len(kept), len(images), len(learned), len(text), len(example.images))
    content = kept.tobytes() + array("i", images + learned).tobytes() + text
    return counts + _sum(counts, content) + content


def _pack_texts(names: tuple[str, ...] | None, unread: tuple[str, ...]) -> bytes:
    """As JSON, faster than a whole encoder."""
    written = "null" if names is None else f"[{','.join(map(encode_basestring_ascii, names))}]"
    return f"[{written},[{','.join(map(encode_basestring_ascii, unread))}]]".encode()


def unpack_example(entry: bytes, number: int, image_token_id: int | None) -> KeptExample | None:
    """What `pack_example` packed; None if it is not that, or of another record."""
    if len(entry) < _HEADER:
        return None
    counts, content = _COUNTS.unpack_from(entry), entry[_HEADER:]
    written, sum_ = entry[: _COUNTS.size], entry[_COUNTS.size : _HEADER]
    if counts[0] != number or len(content) != _content_size(counts) or _sum(written, content) != sum_:
        return None
    _, num_kept, num_images, num_learned, num_bytes, images = counts
    numbers = array("i", content[: len(content) - num_bytes]).tolist()
    ids, runs = numbers[:num_kept], numbers[num_kept : num_kept + num_images]
    for start, end in zip(runs[::2], runs[1::2], strict=True):
        assert image_token_id is not None  # another would make another store
        ids[start:start] = [image_token_id] * (end - start)
    labels = [IGNORE_INDEX] * len(ids)
    learned = numbers[len(numbers) - num_learned :]
    for start, end in zip(learned[::2], learned[1::2], strict=True):
        labels[start:end] = ids[start:end]
    names, unread = json.loads(content[len(content) - num_bytes :]) if num_bytes else ((), ())
    return KeptExample(ids, labels, images, None if names is None else tuple(names), tuple(unread))


def image_names(parsed: Conversation, count: int) -> tuple[str, ...] | None:
    """The first `count` images as their record names them; None where it embeds one of them."""
    names = tuple(image for image in parsed.images[:count] if isinstance(image, str))
    return names if len(names) == count else None


def _read_entry(descriptor: int, start: int) -> bytes:
    raw = os.pread(descriptor, _GUESS, start)
    if len(raw) < _HEADER:
        return b""
    size = _HEADER + _content_size(_COUNTS.unpack_from(raw))
    if size <= len(raw) or size > os.fstat(descriptor).st_size - start:
        return raw[: max(size, 0)]
    return raw + os.pread(descriptor, size - len(raw), start + len(raw))


def _content_size(counts: tuple[int, ...]) -> int:
    return 4 * (counts[1] + counts[2] + counts[3]) + counts[4]


def _sum(counts: bytes, content: bytes) -> bytes:
    return zlib.crc32(content, zlib.crc32(counts)).to_bytes(4, "little")


def _runs(values: list[int], wanted: int) -> list[int]:
    """First and one past the last of every run of a value.

    >>> _runs([5, 9, 9, 6, 9], 9)
    [1, 3, 4, 5]
    """
    count = values.count(wanted)
    first = values.index(wanted) if count else 0
    if values[first : first + count].count(wanted) == count:  # as usual: one run, or none
        return [first, first + count] if count else []
    runs: list[int] = []
    flags = bytes(map(wanted.__eq__, values))
    start = first
    while start >= 0:
        end = flags.find(0, start)
        end = len(flags) if end < 0 else end
        runs += start, end
        start = flags.find(1, end)
    return runs


def _learned_runs(labels: list[int]) -> list[int]:
    """First and one past the last of every run of labels that are token ids.

    >>> _learned_runs([-100, -100, 7, 8, -100, 9]), _learned_runs([-100])
    ([2, 4, 5, 6], [])
    """
    runs: list[int] = []
    end, num_left = 0, len(labels) - labels.count(IGNORE_INDEX)
    while num_left:
        start = _first_learned(labels, end)
        end = labels.index(IGNORE_INDEX, start) if IGNORE_INDEX in labels[start:] else len(labels)
        num_left -= end - start
        runs += start, end
    return runs


def _first_learned(labels: list[int], start: int) -> int:
    """The place of the first token id from `start` on; there is one. Halves, as `count` is quicker than a loop."""
    stop = len(labels)
    while stop - start > 1:
        middle = (start + stop) // 2
        if labels[start:middle].count(IGNORE_INDEX) == middle - start:
            start = middle
        else:
            stop = middle
    return start


def _path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.tokens"
