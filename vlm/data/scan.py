"""One pass over all records before training: how long each is, and which cannot be used.

Everything later (order, packing, number of steps) is a pure function of the arrays made here.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
import time
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
from vlm.data.examples import ExampleStore, Kept, KeptExample, image_names, keep, pack_example
from vlm.data.lengths import load_array, store_array
from vlm.data.moulds import Moulds
from vlm.data.notes import UnreadLog
from vlm.data.preferences import Reads
from vlm.data.records import RecordSource
from vlm.data.sharing import Shares, find_pair_stem, stem_key, stem_of
from vlm.data.tokenize import ConversationTokenizer
from vlm.errors import DataError, RecordError
from vlm.logs import Progress, log, warn

COLUMNS = 6  # of the table: tokens, images, supervised tokens, tokens of the stem, its key, place in the store
CHUNK = 2000  # records per task of a scanning process
CHUNK_BYTES = 1 << 20  # the same of documents of plain text
MANY = 50_000  # records that are spread over the cores though data.workers is 0: half a minute's work on one
MANY_BYTES = 24 << 20  # the same of documents of plain text
STORE_SECONDS = 30.0  # between writes of a table that is not finished; an interrupted scan goes on from there

_MEASURED = "the records are measured"

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
    store: ExampleStore | None = None  # of what the scan tokenized
    places: np.ndarray | None = None  # int64 [n + m], in the store; 0 for what is not in it

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    @property
    def reads(self) -> Reads:
        """What its records are, as the objective says."""
        return self.sources[0].reads

    def locate(self, number: int) -> tuple[RecordSource, int]:
        """The source that a record, or a piece of one, is from, and its number there."""
        number = self._record_of(number)
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
        """As the scan kept it, else from its text.

        Raises:
            RecordError: see `RecordSource.conversation` and `ConversationTokenizer.fit`.
        """
        if self.store is not None and self.places is not None and self.places[number]:
            kept = self.store.read(int(self.places[number]), self._record_of(number))
            if kept is not None:
                return self._complete(number, kept)
        return self.tokenize(self.conversation(number))

    def conversation(self, number: int) -> Conversation:
        """A record, or a piece of one. Raises RecordError, see `RecordSource.conversation`."""
        source, local = self.locate(number)
        conversation = source.conversation(local)
        span = self.pieces.span(number, len(self)) if len(self.pieces) else None
        return conversation if span is None else piece_of(conversation, *span[1:])

    def cut(self, conversation: Conversation) -> list[tuple[int, Example]]:
        """Of a whole record: the first character of each piece that fits a row, and the piece.

        Raises:
            RecordError: see `ConversationTokenizer.fit`, for the whole record.
        """
        if type(conversation) is Conversation and conversation.turns and may_cut(conversation, self.tokenizer):
            pieces = cut_document(conversation, self.tokenizer, self.max_length)
            text = conversation.turns[-1].text
            if len(pieces) > 1 or (pieces and not text[-1].isspace()):
                return pieces
        return [(0, self.tokenize(conversation))]  # white space at the end of a text that is whole stays

    def tokenize(self, conversation: Conversation) -> Example:
        return self.tokenizer.fit(conversation, self.max_length, self.max_images, self.over_long)

    def _record_of(self, number: int) -> int:
        """The record that a piece is of, else the record itself."""
        return number if number < len(self) else int(self.pieces.table[number - len(self), 0])

    def _complete(self, number: int, kept: KeptExample) -> Example:
        source, local = self.locate(number)
        where = source.where(local)
        if kept.names is None:
            images = source.conversation(local).images[: kept.num_images]
        else:
            images = source.find_images(kept.names, where)
        return Example(kept.input_ids, kept.labels, images, where, kept.unread)


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
    reference: np.ndarray | None = None  # float32 [n, 2]: log-probabilities of replies under it; NaN: unknown

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, number: int) -> Example:
        """A record, with what the reference model says of its replies.

        Raises:
            RecordError: see `ExampleReader.read`; rule no_reference: its replies were not scored, since its image could
                not be read then.
        """
        example = self.reader.read(number)
        if self.reference is None:
            return example
        scores = self.reference[number, : len(example.branches)]
        if np.isnan(scores).any():
            raise RecordError(
                "no_reference", "its image could not be read when the reference was computed", example.where
            )
        return replace(example, reference=tuple(scores.tolist()))

    def sizes_in_row(self, shares: bool) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and images that each record brings to a row, int [n + m]: of a preference whose branches share what
        they begin with, that counts once."""
        if not shares or not self.shares.has_pairs:
            return self.lengths, self.num_images
        within = self.shares.within
        return self.lengths - within, np.where(within > 0, self.num_images // 2, self.num_images)

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

    What is tokenized is kept, and the scan's reader reads it. Records that were skipped are looked at again each time:
    the missing image may be there now. A scan that was interrupted goes on where it last wrote its table. Nothing is
    kept where lengths depend on the images' own sizes.

    Raises:
        DataError: no record has a supervised token; shows one record as it was tokenized.
    """
    folder = None if cache is None or reader.tokenizer.reads_images else cache / "lengths" / _key(reader)
    stored = None if folder is None else folder / "table.npy"
    store = None if folder is None else ExampleStore(folder, reader.tokenizer.image_token_id)
    loaded = None if stored is None or store is None else _load(stored, len(reader), store)
    if loaded is None:
        log(f"data: measuring {len(reader):,} records")
    table, pieces, unread = loaded or (
        np.zeros((COLUMNS, len(reader)), dtype=np.int64),
        np.zeros((0, PIECE_COLUMNS), dtype=np.int64),
        UnreadLog(),
    )
    again = np.flatnonzero(table[0] == 0)
    if len(again):
        table = np.array(table)  # the stored one is mapped and stays as it is
    skips: list[Skip] = []
    written, is_new = time.monotonic(), loaded is None
    writing = replace(reader, store=store if reader.reads == "conversation" else None)
    sizes = _sizes_of_work(reader)
    for start, measured in in_chunks(writing, again, measure, workers, "data: measured", *sizes):
        table[:, again[start : start + measured.table.shape[1]]] = measured.table
        pieces = np.concatenate([pieces, measured.pieces]) if len(measured.pieces) else pieces
        skips += measured.skips
        unread.merge(measured.unread)
        is_new = is_new or bool(measured.table[0].any())
        if stored is not None and time.monotonic() - written > STORE_SECONDS:
            _store(stored, table, pieces, unread)
            written = time.monotonic()
    if stored is not None and is_new:  # else all of them are skipped again
        _store(stored, table, pieces, unread)
    scan = _scan_of(replace(reader, store=store), table, pieces, skips, unread)
    _refuse_unsupervised(scan)
    return scan


def _scan_of(
    reader: ExampleReader, table: np.ndarray, pieces: np.ndarray, skips: list[Skip], unread: UnreadLog
) -> Scan:
    """Of the tables of records [COLUMNS, n] and of pieces [m, PIECE_COLUMNS]."""
    pieces = pieces[np.argsort(pieces[:, 0], kind="stable")]  # a record that was skipped once comes after later ones
    if len(pieces):  # else the table stays mapped
        more = np.zeros((COLUMNS, len(pieces)), dtype=np.int64)
        more[[0, 2, 5]] = pieces[:, 2:].T
        table = np.concatenate([table, more], axis=1)
    lengths, num_supervised, stems = (table[column].astype(np.int32) for column in (0, 2, 3))
    shares = Shares(keys=table[4], stems=stems)
    reader = replace(reader, pieces=Pieces(pieces), places=None if reader.store is None else table[5])
    return Scan(reader, lengths, table[1].astype(np.int16), num_supervised, shares, skips, unread)


def refuse_too_many(scan: Scan, max_share: float) -> None:
    """Raise DataError when more than `max_share` of the records are skipped, or all of one source."""
    skip_rules.refuse_too_many(scan.skips, len(scan), max_share)
    skip_rules.refuse_lost_source(scan.skips, scan.reader.count_by_source(scan.lengths > 0))


class Measured(NamedTuple):
    """Some records, k of them, and the m pieces after the first of those that were cut."""

    table: np.ndarray  # int64 [COLUMNS, k]; zeros of those that are skipped
    pieces: np.ndarray  # int64 [m, PIECE_COLUMNS]
    skips: list[Skip]
    unread: UnreadLog


def measure(reader: ExampleReader, numbers: np.ndarray) -> Measured:
    unread = UnreadLog()
    skips: list[Skip] = []
    pieces = [np.zeros((0, PIECE_COLUMNS), dtype=np.int64)]
    entries: list[bytes] = []
    figures: list[tuple[int, ...]] = []
    moulds = {id(s): Moulds(s, reader.tokenizer, reader.max_length, reader.max_images) for s in reader.sources}
    for number in numbers.tolist():
        source, local = reader.locate(number)
        try:
            record = source.record(local)
            kept = moulds[id(source)].cast(local, record)
            found = _understand(reader, source, local, record) if kept is None else _found(reader, kept)
        except RecordError as error:
            skips.append(Skip(error.rule, error.where, error.message))
            figures.append((0,) * (COLUMNS - 1))
            continue
        figures.append(found.figures)
        if found.kept.unread:
            unread.add(source.name, source.where(local), found.kept.unread)
        if found.more:
            pieces.append(_measure_pieces(reader, number, found.more))
        if reader.store is not None:
            entries.append(pack_example(number, found.kept))
    table = np.zeros((COLUMNS, len(numbers)), dtype=np.int64)
    table[:-1] = np.array(figures, dtype=np.int64).reshape(-1, COLUMNS - 1).T
    if reader.store is not None:
        table[-1, table[0] > 0] = reader.store.add(entries)
    return Measured(table, np.concatenate(pieces), skips, unread)


class _Found(NamedTuple):
    """What a record is."""

    figures: tuple[int, ...]  # as in the table, without the place
    kept: Kept
    more: list[tuple[int, Example]]  # pieces after the first


def _understand(reader: ExampleReader, source: RecordSource, local: int, record: dict[str, Any]) -> _Found:
    """Raises RecordError: see `ExampleReader.conversation` and `ExampleReader.cut`."""
    parsed = source.parse(local, record)
    (_, example), *more = reader.cut(source.with_images(parsed))
    kept = keep(example, image_names(parsed, len(example.images)), reader.tokenizer.image_token_id)
    if example.rejected is None:
        return _found(reader, kept, more)
    branches = example.branches
    num_images, num_supervised = sum(len(b.images) for b in branches), sum(b.num_supervised for b in branches)
    return _Found((example.num_tokens, num_images, num_supervised, find_pair_stem(example), 0), kept, more)


def _found(reader: ExampleReader, kept: Kept, more: list[tuple[int, Example]] | None = None) -> _Found:
    stem = stem_of(kept)
    key = stem_key(kept, stem, reader.tokenizer.image_token_id)
    return _Found((kept.runs.length, len(kept.images), kept.runs.num_supervised, stem, key), kept, more or [])


def _measure_pieces(reader: ExampleReader, number: int, pieces: list[tuple[int, Example]]) -> np.ndarray:
    """The table of the pieces after the first of record `number`, int64 [m, PIECE_COLUMNS]; they are kept at once, as
    a document may be long."""
    rows = [(number, start, len(piece.input_ids), piece.num_supervised, 0) for start, piece in pieces]
    table = np.array(rows, dtype=np.int64)
    if reader.store is not None:
        image_token_id = reader.tokenizer.image_token_id
        table[:, 4] = reader.store.add([pack_example(number, keep(piece, (), image_token_id)) for _, piece in pieces])
    return table


def _sizes_of_work(reader: ExampleReader) -> tuple[int, int]:
    """`chunk` and `many` of `in_chunks`: fewer records where they are documents of plain text, which may be large."""
    mean = sum(source.num_text_bytes for source in reader.sources) / max(1, len(reader))
    if not mean:
        return CHUNK, MANY
    return max(1, min(CHUNK, int(CHUNK_BYTES / mean))), max(1, min(MANY, int(MANY_BYTES / mean)))


def in_chunks(
    reader: ExampleReader,
    numbers: np.ndarray,
    work: Work[Result],
    workers: int,
    what: str,
    chunk: int | None = None,
    many: int | None = None,
) -> Iterator[tuple[int, Result]]:
    """Do `work` to `numbers`, `chunk` records at a time, in several processes when there is enough of it.

    Args:
        work: a function that another process can import.
        workers: processes; with 0, all cores are used for `many` records or more.
        what: begins the lines that tell the progress.
        chunk, many: None means CHUNK and MANY.

    Yields:
        (start, result) of `numbers[start : start + chunk]`, in order.

    Raises:
        DataError: one of the processes that `workers` asks for died.
    """
    size = chunk or CHUNK
    starts = range(0, len(numbers), size)
    chunks = [numbers[start : start + size] for start in starts]
    num_processes = usable_workers(workers or (len(numbers) if len(numbers) >= (many or MANY) else 0))
    done = 0
    with Progress(what, len(numbers), "records") as progress:
        try:
            # a process takes seconds to start
            spread = num_processes > 1 if not workers else num_processes > 0
            if spread and len(chunks) >= 2 * num_processes:
                for result in _in_processes(reader, work, chunks, num_processes):
                    yield starts[done], result
                    done += 1
                    progress.show(min(done * size, len(numbers)))
        except BrokenProcessPool:
            died = "a process that reads records died, usually because memory ran out"
            if workers:
                raise DataError(f"{died}. Lower data.workers (now {num_processes})") from None
            warn(f"{died}; the records are read in one process")
        for start, some in zip(starts[done:], chunks[done:], strict=True):
            yield start, work(reader, some)
            progress.show(start + len(some))


def _in_processes(reader: ExampleReader, work: Work[Result], chunks: list[np.ndarray], count: int) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")  # a forked child would inherit torch's threads in a broken state
    with ProcessPoolExecutor(count, mp_context=context, initializer=_keep, initargs=(reader, work)) as pool:
        yield from pool.map(_do_kept, chunks)


_kept: list[tuple[ExampleReader, Work]] = []  # in a helping process: what it works on


def _keep(reader: ExampleReader, work: Work) -> None:
    _kept.append((reader, work))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A run that is killed cannot end its helping processes, and they would wait for it forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


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
        "version": 7,  # of the table, and of how conversations become tokens
    }
    if reader.reads != "conversation":
        settings["reads"] = reader.reads
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]


def _load(path: Path, num_records: int, store: ExampleStore) -> tuple[np.ndarray, np.ndarray, UnreadLog] | None:
    """The tables of records [COLUMNS, n] and of pieces [m, PIECE_COLUMNS], and what was not read; None when there are
    none, they are damaged, or what was tokenized is gone."""
    loaded = load_array(path, _MEASURED)
    if loaded is None:
        return None
    numbers, unread = loaded
    num_pieces, rest = divmod(numbers.size - COLUMNS * num_records, PIECE_COLUMNS)
    if numbers.ndim != 1 or num_pieces < 0 or rest:
        return None
    table = numbers[: COLUMNS * num_records].reshape(COLUMNS, num_records)
    pieces = numbers[COLUMNS * num_records :].reshape(num_pieces, PIECE_COLUMNS)
    if not (store.holds(table[5]) and store.holds(pieces[:, 4])):
        return None
    return table, pieces, UnreadLog.from_json(unread)


def _store(path: Path, table: np.ndarray, pieces: np.ndarray, unread: UnreadLog) -> None:
    """In one file, so that a kill cannot leave the one without the other."""
    store_array(path, np.concatenate([table.ravel(), pieces.ravel()]), _MEASURED, unread.to_json())


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
