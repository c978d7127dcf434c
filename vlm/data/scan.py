"""One pass over all records before training: how long each is, and which cannot be used.

Everything later (order, packing, number of steps) is a pure function of the arrays made here.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vlm.batch import IGNORE_INDEX, Example, Skip
from vlm.data import skips as skip_rules
from vlm.data.conversation import Conversation
from vlm.data.documents import PIECE_COLUMNS, Pieces, cut_document, may_cut, piece_of
from vlm.data.notes import UnreadLog
from vlm.data.records import RecordSource
from vlm.data.sharing import Shares, find_stem, stem_key
from vlm.data.tokenize import ConversationTokenizer
from vlm.errors import DataError, RecordError
from vlm.files import replacing
from vlm.logs import Progress, log, warn

COLUMNS = 5  # of the table: tokens, images, supervised tokens, tokens of the stem, its key
CHUNK = 2000  # records per task of a scanning process
STORE_SECONDS = 30.0  # between writes of a table that is not finished; an interrupted scan goes on from there

Result = TypeVar("Result")
Work = Callable[["ExampleReader", np.ndarray], Result]  # done to the records of these numbers


@dataclass(frozen=True)
class ExampleReader:
    """Reads and tokenizes record `number`, counted through all sources; after them come the pieces of long texts."""

    sources: tuple[RecordSource, ...]
    tokenizer: ConversationTokenizer
    max_length: int
    max_images: int
    over_long: str
    pieces: Pieces = field(default_factory=Pieces)  # of records that were cut, once they were measured

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def locate(self, number: int) -> tuple[RecordSource, int]:
        """The source that a record, or a piece of one, is from, and its number there."""
        if len(self) <= number < len(self) + len(self.pieces):
            number = int(self.pieces.table[number - len(self), 0])
        for source in self.sources:
            if number < len(source):
                return source, number
            number -= len(source)
        raise IndexError(number)

    def count_by_source(self, chosen: np.ndarray) -> dict[str, int]:
        """How many records of each source are true in `chosen`, bool [n]."""
        counts: dict[str, int] = {}
        start = 0
        for source in self.sources:
            counts[source.name] = counts.get(source.name, 0) + int(chosen[start : start + len(source)].sum())
            start += len(source)
        return counts

    def read(self, number: int) -> Example:
        """Raises RecordError, see `RecordSource.conversation` and `ConversationTokenizer.fit`."""
        return self._fit(self.conversation(number))

    def conversation(self, number: int) -> Conversation:
        """A record, or a piece of one. Raises RecordError, see `RecordSource.conversation`."""
        source, local = self.locate(number)
        conversation = source.conversation(local)
        span = self.pieces.span(number, len(self)) if len(self.pieces) else None
        return conversation if span is None else piece_of(conversation, *span[1:])

    def cut(self, number: int) -> list[tuple[int, Example]]:
        """Of a record that is not cut yet: the first character of each piece that fits a row, and the piece.

        Raises RecordError as `read` does, for the whole record.
        """
        conversation = self.conversation(number)
        if not conversation.turns or not may_cut(conversation, self.tokenizer):
            return [(0, self._fit(conversation))]
        starts = cut_document(conversation, self.tokenizer, self.max_length)
        if len(starts) < 2:
            return [(0, self._fit(conversation))]
        spans = zip(starts, [*starts[1:], None], strict=True)
        return [(start, self._fit(piece_of(conversation, start, stop))) for start, stop in spans]

    def _fit(self, conversation: Conversation) -> Example:
        return self.tokenizer.fit(conversation, self.max_length, self.max_images, self.over_long)


@dataclass(frozen=True)
class Scan:
    """What is known of every record, n of them, and of the m pieces after the first of texts that were cut. A skipped
    record has length 0."""

    reader: ExampleReader
    lengths: np.ndarray  # int32 [n + m], tokens
    num_images: np.ndarray  # int16 [n + m]
    num_supervised: np.ndarray  # int32 [n + m], tokens that the loss counts
    shares: Shares  # which records begin alike
    skips: list[Skip] = field(default_factory=list)
    unread: UnreadLog = field(default_factory=UnreadLog)

    def __len__(self) -> int:
        return len(self.reader)

    def with_pieces(self, records: np.ndarray) -> np.ndarray:
        """Numbers of records, int64 [k], and after them those of all their pieces."""
        return self.reader.pieces.of(records, len(self)) if len(self.reader.pieces) else records

    def describe_cut(self) -> str:
        """What became of texts longer than a row, for people; empty if there are none."""
        pieces = self.reader.pieces
        if not len(pieces):
            return ""
        rows, limit = pieces.num_cut + len(pieces), self.reader.max_length
        return f"{pieces.num_cut:,} texts of more than {limit} tokens are cut into {rows:,} pieces"

    def warnings(self) -> list[str]:
        """What the usable records hold and nothing read, a line per source."""
        return self.unread.warnings(self.reader.count_by_source(self.lengths > 0))

    def digest(self) -> str:
        """Changes when any record's length, images or labels do, and with them the order of training."""
        state = hashlib.sha256()
        for array in (self.lengths, self.num_images, self.num_supervised):
            state.update(np.ascontiguousarray(array).tobytes())
        return state.hexdigest()[:16]


def usable_workers(wanted: int) -> int:
    """No more than the cores that this process may use: more only take memory."""
    return min(wanted, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def scan_records(reader: ExampleReader, cache: Path | None, workers: int = 0) -> Scan:
    """Measure every record, from the cache where its file, the tokenizer and the settings are unchanged.

    Records that were skipped are looked at again each time: the missing image may be there now. A scan that was
    interrupted goes on where it last wrote its table. Nothing is kept where lengths depend on the images' own sizes.

    Raises:
        DataError: no record has a supervised token; shows one record as it was tokenized.
    """
    cache = None if reader.tokenizer.reads_images else cache
    stored = cache / "lengths" / f"{_key(reader)}.npz" if cache is not None else None
    loaded = None if stored is None else _load(stored, len(reader))
    if loaded is None:
        log(f"data: measuring {len(reader):,} records")
    table, pieces, unread = loaded or (
        np.zeros((len(reader), COLUMNS), dtype=np.int64),
        np.zeros((0, PIECE_COLUMNS), dtype=np.int64),
        UnreadLog(),
    )
    again = np.flatnonzero(table[:, 0] == 0)
    skips: list[Skip] = []
    written = time.monotonic()
    for start, measured in in_chunks(reader, again, measure, workers, "data: measured"):
        table[again[start : start + len(measured.table)]] = measured.table
        pieces = np.concatenate([pieces, measured.pieces])
        skips += measured.skips
        unread.merge(measured.unread)
        if stored is not None and time.monotonic() - written > STORE_SECONDS:
            _store(stored, table, pieces, unread)
            written = time.monotonic()
    if stored is not None and len(again):
        _store(stored, table, pieces, unread)
    scan = _scan_of(reader, table, pieces, skips, unread)
    _refuse_unsupervised(scan)
    return scan


def _scan_of(
    reader: ExampleReader, table: np.ndarray, pieces: np.ndarray, skips: list[Skip], unread: UnreadLog
) -> Scan:
    """Of the tables of records [n, COLUMNS] and of pieces [m, PIECE_COLUMNS]."""
    pieces = pieces[np.argsort(pieces[:, 0], kind="stable")]  # a record that was skipped once comes after later ones
    more = np.zeros((len(pieces), COLUMNS), dtype=np.int64)
    more[:, (0, 2)] = pieces[:, (2, 3)]
    table = np.concatenate([table, more])
    lengths, num_supervised, stems = (table[:, column].astype(np.int32) for column in (0, 2, 3))
    shares = Shares(keys=table[:, 4].copy(), stems=stems)
    reader = replace(reader, pieces=Pieces(pieces))
    return Scan(reader, lengths, table[:, 1].astype(np.int16), num_supervised, shares, skips, unread)


def refuse_too_many(scan: Scan, max_share: float) -> None:
    """Raise DataError when more than `max_share` of the records are skipped, or all of one source."""
    skip_rules.refuse_too_many(scan.skips, len(scan), max_share)
    skip_rules.refuse_lost_source(scan.skips, scan.reader.count_by_source(scan.lengths > 0))


class Measured(NamedTuple):
    """Some records."""

    table: np.ndarray  # int64 [k, COLUMNS]; zeros of those that are skipped
    pieces: np.ndarray  # int64 [m, PIECE_COLUMNS]
    skips: list[Skip]
    unread: UnreadLog


def measure(reader: ExampleReader, numbers: np.ndarray) -> Measured:
    unread = UnreadLog()
    table = np.zeros((len(numbers), COLUMNS), dtype=np.int64)
    skips: list[Skip] = []
    pieces: list[tuple[int, int, int, int]] = []
    for row, number in enumerate(numbers.tolist()):
        try:
            (_, example), *more = reader.cut(number)
        except RecordError as error:
            skips.append(Skip(error.rule, error.where, error.message))
            continue
        pieces += [(number, start, len(piece.input_ids), piece.num_supervised) for start, piece in more]
        stem = find_stem(example, reader.tokenizer.image_token_id)
        key = stem_key(example, stem)
        table[row] = len(example.input_ids), len(example.images), example.num_supervised, stem, key
        if example.unread:
            unread.add(reader.locate(number)[0].name, example.where, example.unread)
    return Measured(table, np.array(pieces, dtype=np.int64).reshape(-1, PIECE_COLUMNS), skips, unread)


def in_chunks(
    reader: ExampleReader, numbers: np.ndarray, work: Work[Result], workers: int, what: str, chunk: int | None = None
) -> Iterator[tuple[int, Result]]:
    """Do `work` to `numbers`, `chunk` records at a time, in `workers` processes when there is enough of it.

    Args:
        work: a function that another process can import.
        what: begins the lines that tell the progress.
        chunk: None means CHUNK.

    Yields:
        (start, result) of `numbers[start : start + chunk]`, in order.

    Raises:
        DataError: a process died.
    """
    size, workers = chunk or CHUNK, usable_workers(workers)
    starts = range(0, len(numbers), size)
    chunks = [numbers[start : start + size] for start in starts]
    if workers == 0 or len(chunks) < 2 * workers:  # a process takes seconds to start
        with Progress(what, len(numbers), "records") as progress:
            for start, some in zip(starts, chunks, strict=True):
                yield start, work(reader, some)
                progress.show(start + len(some))
        return
    context = multiprocessing.get_context("spawn")  # a forked child would inherit torch's threads in a broken state
    with (
        Progress(what, len(numbers), "records") as progress,
        ProcessPoolExecutor(workers, mp_context=context, initializer=_keep, initargs=(reader, work)) as pool,
    ):
        try:
            for start, result in zip(starts, pool.map(_do_kept, chunks), strict=True):
                yield start, result
                progress.show(min(start + size, len(numbers)))
        except BrokenProcessPool:
            raise DataError(
                f"a process that reads records died, usually because memory ran out. Lower data.workers (now {workers})"
            ) from None


_kept: list[tuple[ExampleReader, Work]] = []  # in a helping process: what it works on


def _keep(reader: ExampleReader, work: Work) -> None:
    _kept.append((reader, work))


def _do_kept(numbers: np.ndarray) -> Any:
    reader, work = _kept[0]
    return work(reader, numbers)


def _key(reader: ExampleReader) -> str:
    settings = {
        "sources": [
            (source.fingerprint, source.config.model_dump(mode="json"), source.image_placement)
            for source in reader.sources
        ],
        "tokenizer": reader.tokenizer.fingerprint(),
        "limits": [reader.max_length, reader.max_images, reader.over_long],
        "version": 5,  # of the table, and of how conversations become tokens
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]


def _load(path: Path, num_records: int) -> tuple[np.ndarray, np.ndarray, UnreadLog] | None:
    """The stored tables and what was not read, or None when there is none or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            table, pieces, unread = arrays["table"], arrays["pieces"], UnreadLog.from_json(str(arrays["unread"]))
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        warn(f"data.cache: {path.name} is damaged ({error}); the records are measured again")
        return None
    fits = table.shape == (num_records, COLUMNS) and pieces.shape[1:] == (PIECE_COLUMNS,)
    return (table, pieces, unread) if fits and table.dtype == pieces.dtype == np.int64 else None


def _store(path: Path, table: np.ndarray, pieces: np.ndarray, unread: UnreadLog) -> None:
    try:
        with replacing(path) as temporary:
            np.savez(temporary, table=table, pieces=pieces, unread=np.array(unread.to_json()))
    except OSError as error:
        warn(f"data.cache: cannot write to {path.parent} ({error.strerror}); records are measured again next time")


def _refuse_unsupervised(scan: Scan) -> None:
    """A wrong template or wrong roles must stop the run at its start, not train on nothing."""
    by_rule = Counter(skip.rule for skip in scan.skips)
    if scan.lengths.any() or not by_rule["no_supervised_tokens"]:
        return
    rest = "" if len(by_rule) == 1 else f" ({skip_rules.counts_by_rule(by_rule)})"
    raise DataError(
        f"0 of {len(scan)} samples have supervised tokens{rest}. Usually the records' roles or data.template are not "
        f"what they seem. {_first_masked(scan.reader)}"
    )


def _first_masked(reader: ExampleReader) -> str:
    """How the first record that can be read looks to the model, and which of it would be learned."""
    for number in range(len(reader)):
        source, local = reader.locate(number)
        try:
            ids, labels = reader.tokenizer.encode(source.conversation(local))
        except RecordError:
            continue
        shown = reader.tokenizer.text(ids[:60])
        learned = reader.tokenizer.text([label for label in labels if label != IGNORE_INDEX])
        return f"{source.where(local)} is {shown!r}, of which {learned!r} would be learned"
    return ""
