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
from typing import Any, TypeVar

import numpy as np

from vlm.batch import IGNORE_INDEX, Example, Skip
from vlm.data import skips as skip_rules
from vlm.data.conversation import Conversation
from vlm.data.examples import ExampleStore, KeptExample, image_names, pack_example
from vlm.data.lengths import load_array, store_array
from vlm.data.notes import UnreadLog
from vlm.data.records import RecordSource
from vlm.data.sharing import Shares, find_stem, stem_key
from vlm.data.tokenize import ConversationTokenizer
from vlm.errors import DataError, RecordError
from vlm.logs import Progress, log, warn

COLUMNS = 6  # of the table: tokens, images, supervised tokens, tokens of the stem, its key, place in the store
CHUNK = 2000  # records per task of a scanning process
MANY = 50_000  # records that are spread over the cores though data.workers is 0: half a minute's work on one
STORE_SECONDS = 30.0  # between writes of a table that is not finished; an interrupted scan goes on from there

_MEASURED = "the records are measured"

Result = TypeVar("Result")
Work = Callable[["ExampleReader", np.ndarray], Result]  # done to the records of these numbers


@dataclass(frozen=True)
class ExampleReader:
    """Reads and tokenizes record `number`, counted through all sources."""

    sources: tuple[RecordSource, ...]
    tokenizer: ConversationTokenizer
    max_length: int
    max_images: int
    over_long: str
    store: ExampleStore | None = None  # of what the scan tokenized
    places: np.ndarray | None = None  # int64 [n], in the store; 0 for records that are not in it

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def locate(self, number: int) -> tuple[RecordSource, int]:
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
            kept = self.store.read(int(self.places[number]), number)
            if kept is not None:
                return self._complete(number, kept)
        source, local = self.locate(number)
        return self.tokenize(source.conversation(local))

    def tokenize(self, conversation: Conversation) -> Example:
        return self.tokenizer.fit(conversation, self.max_length, self.max_images, self.over_long)

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
    """What is known of every record. A skipped record has length 0."""

    reader: ExampleReader
    lengths: np.ndarray  # int32 [n], tokens
    num_images: np.ndarray  # int16 [n]
    num_supervised: np.ndarray  # int32 [n], tokens that the loss counts
    shares: Shares  # which records begin alike
    skips: list[Skip] = field(default_factory=list)
    unread: UnreadLog = field(default_factory=UnreadLog)

    def __len__(self) -> int:
        return len(self.lengths)

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
    loaded = None if stored is None else load_array(stored, _MEASURED)
    if loaded is not None and loaded[0].shape != (COLUMNS, len(reader)):
        loaded = None
    if loaded is not None and store is not None and not store.holds(loaded[0][5]):
        loaded = None
    if loaded is None:
        log(f"data: measuring {len(reader):,} records")
    table = np.zeros((COLUMNS, len(reader)), dtype=np.int64) if loaded is None else loaded[0]
    unread = UnreadLog() if loaded is None else UnreadLog.from_json(loaded[1])
    again = np.flatnonzero(table[0] == 0)
    if len(again):
        table = np.array(table)  # the stored one is mapped and stays as it is
    skips: list[Skip] = []
    written, is_new = time.monotonic(), loaded is None
    writing = replace(reader, store=store)
    for start, (columns, skipped, unread_there) in in_chunks(writing, again, measure, workers, "data: measured"):
        table[:, again[start : start + columns.shape[1]]] = columns
        skips += skipped
        unread.merge(unread_there)
        is_new = is_new or bool(columns[0].any())
        if stored is not None and time.monotonic() - written > STORE_SECONDS:
            store_array(stored, table, _MEASURED, unread.to_json())
            written = time.monotonic()
    if stored is not None and is_new:  # else all of them are skipped again
        store_array(stored, table, _MEASURED, unread.to_json())
    lengths, num_supervised, stems = (table[column].astype(np.int32) for column in (0, 2, 3))
    shares = Shares(keys=table[4], stems=stems)
    reading = replace(reader, store=store, places=None if store is None else table[5])
    scan = Scan(reading, lengths, table[1].astype(np.int16), num_supervised, shares, skips, unread)
    _refuse_unsupervised(scan)
    return scan


def refuse_too_many(scan: Scan, max_share: float) -> None:
    """Raise DataError when more than `max_share` of the records are skipped, or all of one source."""
    skip_rules.refuse_too_many(scan.skips, len(scan), max_share)
    skip_rules.refuse_lost_source(scan.skips, scan.reader.count_by_source(scan.lengths > 0))


def measure(reader: ExampleReader, numbers: np.ndarray) -> tuple[np.ndarray, list[Skip], UnreadLog]:
    """The table of some records, int64 [COLUMNS, len(numbers)]; the skipped ones, of zeros; what was not read."""
    unread = UnreadLog()
    table = np.zeros((COLUMNS, len(numbers)), dtype=np.int64)
    skips: list[Skip] = []
    entries: list[bytes] = []
    image_token_id = reader.tokenizer.image_token_id
    for column, number in enumerate(numbers.tolist()):
        source, local = reader.locate(number)
        try:
            parsed = source.parsed(local)
            example = reader.tokenize(source.with_images(parsed))
        except RecordError as error:
            skips.append(Skip(error.rule, error.where, error.message))
            continue
        stem = find_stem(example, image_token_id)
        key = stem_key(example, stem)
        table[:5, column] = len(example.input_ids), len(example.images), example.num_supervised, stem, key
        if example.unread:
            unread.add(source.name, example.where, example.unread)
        if reader.store is not None:
            entries.append(pack_example(number, example, image_names(parsed, len(example.images)), image_token_id))
    if reader.store is not None:
        table[5, table[0] > 0] = reader.store.add(entries)
    return table, skips, unread


def in_chunks(
    reader: ExampleReader, numbers: np.ndarray, work: Work[Result], workers: int, what: str, chunk: int | None = None
) -> Iterator[tuple[int, Result]]:
    """Do `work` to `numbers`, `chunk` records at a time, in several processes when there is enough of it.

    Args:
        work: a function that another process can import.
        workers: processes; with 0, all cores are used for MANY records or more.
        what: begins the lines that tell the progress.
        chunk: None means CHUNK.

    Yields:
        (start, result) of `numbers[start : start + chunk]`, in order.

    Raises:
        DataError: one of the processes that `workers` asks for died.
    """
    size = chunk or CHUNK
    starts = range(0, len(numbers), size)
    chunks = [numbers[start : start + size] for start in starts]
    num_processes = usable_workers(workers or (len(numbers) if len(numbers) >= MANY else 0))
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
        "version": 6,  # of the table, and of how conversations become tokens
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]


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
