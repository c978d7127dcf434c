"""Data files made of data files: `vlm data repeat | split | convert`. Records are read and written one by one."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from vlm.batch import Skip
from vlm.data.config import SourceConfig
from vlm.data.conversation import Conversation
from vlm.data.convert import TARGETS, convert_conversation
from vlm.data.fields import has_content
from vlm.data.notes import UnreadLog
from vlm.data.parse import parse_record
from vlm.data.records import RecordSource, open_source
from vlm.data.skips import counts_by_rule
from vlm.errors import ConfigError, DataError, RecordError
from vlm.files import replacing
from vlm.logs import Progress

_SUFFIXES = (".json", ".jsonl")


@dataclass
class Rewritten:
    """What became of the records of a file."""

    num_read: int
    num_written: dict[Path, int] = field(default_factory=dict)
    skips: list[Skip] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # warnings: keys that were not taken over
    images: Path | None = None  # the folder that images are named from, where it is not the new file's own

    def lines(self) -> Iterator[str]:
        """For people."""
        yield from (f"warning: {line}" for line in self.unread)
        counts = counts_by_rule(Counter(skip.rule for skip in self.skips)) or "none"
        written = ", ".join(f"{count:,} to {path}" for path, count in self.num_written.items())
        yield f"{self.num_read:,} records read, {written}, skipped: {counts}"
        if self.images is not None:
            yield f"images are named from {self.images}: set data.sources[].images: {self.images}"


def repeat_records(config: SourceConfig, out: Path, times: int) -> Rewritten:
    """Write all records of a file `times` times, in their order: the whole file, then the whole file again.

    Raises:
        ConfigError: `out` exists or is not .json or .jsonl; `times` is not positive.
        DataError: the file cannot be read, or no record of it can.
    """
    if times < 1:
        raise ConfigError(f"-n {times}: expected how often to write each record, at least 1")
    with _opened(config) as source, _writers(source, out) as (writer,):
        result, usable, has_images = Rewritten(len(source)), list[int](), False
        for number, record in _read(source, result):
            writer.write(record)
            usable.append(number)
            has_images = has_images or has_content(record.get("image")) or has_content(record.get("images"))
        for _ in range(times - 1):
            for number in usable:
                writer.write(source.index[number])
        return _finish(result, source, [writer], has_images)


def split_records(config: SourceConfig, train: Path, held_out: Path, *, share: float, seed: int) -> Rewritten:
    """Write records into two files so that no image stands in both; nor does a conversation without images.

    Records that show one image, or are tied through records of several images, stay together. Such groups are drawn in
    an order of `seed` and held out while they fit into `share` of the records. Records are copied as they are.

    Args:
        share: of the records that can be used, above 0 and below 1.

    Raises:
        ConfigError: a file exists or is not .json or .jsonl; `share` is out of range.
        DataError: no record can be used, or all hang together.
    """
    if not 0 < share < 1:
        raise ConfigError(f"--share {share}: expected a share of the records above 0 and below 1")
    with _opened(config) as source, _writers(source, train, held_out) as writers:
        result = Rewritten(len(source))
        groups, has_images = _groups(source, result)
        is_held_out = _draw(groups, share, seed, source.name)
        for number in np.flatnonzero(groups >= 0).tolist():
            writers[int(is_held_out[number])].write(source.index[number])
        return _finish(result, source, writers, has_images)


def convert_records(config: SourceConfig, out: Path, target: str, image_placement: str = "auto") -> Rewritten:
    """Write the conversations of a file of any format in the layout `target`, a key of `TARGETS`.

    Images keep their names and need not be there. A record that the layout cannot say is skipped, by a rule.

    Raises:
        ConfigError: `out` exists or is not .json or .jsonl; `target` is not known.
        DataError: the file cannot be read, or no record can be converted.
    """
    if target not in TARGETS:
        raise ConfigError(f"--to {target}: known are {', '.join(TARGETS)}")
    with _opened(config) as source, _writers(source, out) as (writer,):
        result, unread, has_images = Rewritten(len(source)), UnreadLog(), False
        for number, record in _read(source, result):
            try:
                conversation = parse_record(record, source.config, image_placement)
                writer.write(convert_conversation(conversation, target, record.get("id")))
            except RecordError as error:
                result.skips.append(Skip(error.rule, source.where(number), error.message))
                continue
            has_images = has_images or any(isinstance(image, str) for image in conversation.images)
            if conversation.unread:
                unread.add(source.name, source.where(number), conversation.unread)
        result.unread = list(unread.warnings({source.name: writer.count}))
        return _finish(result, source, [writer], has_images)


class _Writer:
    """A .json list or .jsonl file, record by record."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self.file = file
        self.path = path  # what the file will be called
        self.count = 0

    def write(self, record: dict[str, Any]) -> None:
        begin = "" if self.path.suffix == ".jsonl" else ",\n" if self.count else "[\n"
        end = "\n" if self.path.suffix == ".jsonl" else ""
        self.file.write(begin + json.dumps(record, ensure_ascii=False) + end)
        self.count += 1

    def close(self) -> None:
        if self.path.suffix == ".json":
            self.file.write("\n]\n" if self.count else "[]\n")


@contextmanager
def _opened(config: SourceConfig) -> Iterator[RecordSource]:
    """The source, its index in a folder that lives as long as the command."""
    with tempfile.TemporaryDirectory(prefix="vlm-") as cache:
        yield open_source(config, Path(cache))


@contextmanager
def _writers(source: RecordSource, *paths: Path) -> Iterator[list[_Writer]]:
    """New files, which appear when the block ends well.

    Raises:
        ConfigError: a file is there already, two are the same, the suffix is another, or the disk refuses.
    """
    for path in paths:
        if path.suffix not in _SUFFIXES:
            raise ConfigError(f"{path}: a data file is written as {' or '.join(_SUFFIXES)}")
        if path.exists():
            raise ConfigError(f"{path} exists and is not overwritten. Remove it or name another file")
    if len({path.absolute() for path in paths}) < len(paths):
        raise ConfigError(f"{paths[0]} is named twice: the two parts need a file each")
    try:
        with ExitStack() as stack:
            writers = []
            for path in paths:
                temporary = stack.enter_context(replacing(path))
                writers.append(_Writer(stack.enter_context(temporary.open("x", encoding="utf-8")), path))
            yield writers
            for writer in writers:
                writer.close()
    except OSError as error:
        raise ConfigError(f"{paths[0]}: cannot be written while {source.name} is read ({error.strerror})") from None


def _read(source: RecordSource, result: Rewritten) -> Iterator[tuple[int, dict[str, Any]]]:
    """Records that are records, by number; the others are skips."""
    with Progress("data: read", len(source), "records") as progress:
        for number in range(len(source)):
            progress.show(number)
            try:
                yield number, source.index[number]
            except RecordError as error:
                result.skips.append(Skip(error.rule, source.where(number), error.message))


def _groups(source: RecordSource, result: Rewritten) -> tuple[np.ndarray, bool]:
    """For each record the number of a record that stands for its group, -1 where it is skipped: int64 [n].

    Also whether any record names images.
    """
    leader = np.full(len(source), -1, dtype=np.int64)
    first: dict[bytes, int] = {}  # digest of an image or of a conversation without any -> the first record of it
    has_images = False
    for number, record in _read(source, result):
        try:
            conversation = parse_record(record, source.config)
        except RecordError as error:
            result.skips.append(Skip(error.rule, source.where(number), error.message))
            continue
        leader[number] = number
        has_images = has_images or any(isinstance(image, str) for image in conversation.images)
        for key in _keys(conversation, source.images_root):
            one, other = _lead(leader, first.setdefault(key, number)), _lead(leader, number)
            leader[max(one, other)] = min(one, other)
    for number in np.flatnonzero(leader >= 0).tolist():
        leader[number] = _lead(leader, number)
    return leader, has_images


def _lead(leader: np.ndarray, number: int) -> int:
    """Who stands for a record's group; the way there becomes shorter (union-find with path halving)."""
    while leader[number] != number:
        leader[number] = leader[leader[number]]
        number = int(leader[number])
    return number


def _keys(conversation: Conversation, root: Path) -> Iterator[bytes]:
    """What must stay on one side: each image by its file or bytes; without images, the words."""
    for image in conversation.images:
        content = image if isinstance(image, bytes) else os.path.realpath(root / image).encode()
        yield hashlib.blake2b(content, digest_size=16, person=b"image").digest()
    if not conversation.images:
        words = repr(conversation.turns).encode()
        yield hashlib.blake2b(words, digest_size=16, person=b"words").digest()


def _draw(groups: np.ndarray, share: float, seed: int, name: str) -> np.ndarray:
    """Which records are held out, bool [n]."""
    leaders, sizes = np.unique(groups[groups >= 0], return_counts=True)
    if len(leaders) == 1:
        raise DataError(
            f"{name}: cannot be split: its {int(sizes[0])} records show one image, or are tied by records that show "
            "several, and no image may stand on both sides"
        )
    wanted, taken, held = max(1, round(share * int(sizes.sum()))), 0, list[int]()
    for place in np.random.default_rng(seed).permutation(len(leaders)).tolist():
        if taken + sizes[place] <= wanted:
            held.append(int(leaders[place]))
            taken += int(sizes[place])
    return np.isin(groups, held or [int(leaders[sizes.argmin()])])  # none fits: the smallest


def _finish(result: Rewritten, source: RecordSource, writers: list[_Writer], has_images: bool) -> Rewritten:
    """Counts, and where images lie. Raises DataError when nothing could be written."""
    result.num_written = {writer.path: writer.count for writer in writers}
    if not any(result.num_written.values()):
        first = result.skips[0]
        counts = counts_by_rule(Counter(skip.rule for skip in result.skips))
        raise DataError(f"{source.name}: no record can be used ({counts}), e.g. {first.where}: {first.message}")
    if has_images and any(path.parent.resolve() != source.images_root for path in result.num_written):
        result.images = source.images_root
    return result
