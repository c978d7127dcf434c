"""One pass over all records before training: how long each is, and which cannot be used.

Everything later (order, packing, number of steps) is a pure function of the arrays made here.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import secrets
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlm.batch import IGNORE_INDEX, Example, Skip
from vlm.data.records import RecordSource
from vlm.data.skips import MIN_RECORDS_FOR_SHARE, too_many_message
from vlm.data.tokenize import ConversationTokenizer
from vlm.errors import DataError, RecordError
from vlm.logs import log, warn

CHUNK = 2000  # records per task of a scanning process


@dataclass(frozen=True)
class ExampleReader:
    """Reads and tokenizes record `number`, counted through all sources."""

    sources: tuple[RecordSource, ...]
    tokenizer: ConversationTokenizer
    max_length: int
    max_images: int
    over_long: str

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def locate(self, number: int) -> tuple[RecordSource, int]:
        for source in self.sources:
            if number < len(source):
                return source, number
            number -= len(source)
        raise IndexError(number)

    def read(self, number: int) -> Example:
        """Raises RecordError, see `RecordSource.conversation` and `ConversationTokenizer.fit`."""
        source, local = self.locate(number)
        conversation = source.conversation(local)
        return self.tokenizer.fit(conversation, self.max_length, self.max_images, self.over_long)


@dataclass(frozen=True)
class Scan:
    """What is known of every record. A skipped record has length 0."""

    reader: ExampleReader
    lengths: np.ndarray  # int32 [n], tokens
    num_images: np.ndarray  # int16 [n]
    num_supervised: np.ndarray  # int32 [n], tokens that the loss counts
    skips: list[Skip] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lengths)

    def digest(self) -> str:
        """Changes when any record's length, pictures or labels do, and with them the order of training."""
        state = hashlib.sha256()
        for array in (self.lengths, self.num_images, self.num_supervised):
            state.update(np.ascontiguousarray(array).tobytes())
        return state.hexdigest()[:16]


def scan_records(reader: ExampleReader, cache: Path | None, workers: int = 0) -> Scan:
    """Measure every record, from the cache where its file, the tokenizer and the settings are unchanged.

    Records that were skipped are looked at again each time: the missing picture may be there now.

    Raises:
        DataError: no record has a supervised token; shows one record as it was tokenized.
    """
    stored = cache / "lengths" / f"{_key(reader)}.npz" if cache is not None else None
    if stored is not None and stored.exists():
        with np.load(stored, allow_pickle=False) as arrays:
            table = arrays["table"]
    else:
        table = np.zeros((len(reader), 3), dtype=np.int32)
        log(f"data: measuring {len(reader):,} records")
    again = np.flatnonzero(table[:, 0] == 0)
    skips: list[Skip] = []
    for start, rows, skipped in _measured(reader, again, workers):
        table[again[start : start + len(rows)]] = rows
        skips += skipped
    if stored is not None and len(again):
        _store(stored, table)
    scan = Scan(reader, table[:, 0], table[:, 1].astype(np.int16), table[:, 2], skips)
    _refuse_unsupervised(scan)
    return scan


def refuse_too_many(scan: Scan, max_share: float) -> None:
    """Raise DataError when more than `max_share` of the records are skipped."""
    num_skipped = len(scan.skips)
    if num_skipped == len(scan) or (num_skipped > max_share * len(scan) and len(scan) >= MIN_RECORDS_FOR_SHARE):
        by_rule = Counter(skip.rule for skip in scan.skips)
        raise DataError(too_many_message(by_rule, len(scan), scan.skips[0], None))


def measure(reader: ExampleReader, numbers: np.ndarray) -> tuple[np.ndarray, list[Skip]]:
    """int32 [len(numbers), 3]: tokens, pictures, supervised tokens of each record; and the skipped ones."""
    table = np.zeros((len(numbers), 3), dtype=np.int32)
    skips: list[Skip] = []
    for row, number in enumerate(numbers.tolist()):
        try:
            example = reader.read(number)
            if example.num_supervised == 0:
                raise RecordError("no_supervised_tokens", "no token of a reply is learned", example.where)
        except RecordError as error:
            skips.append(Skip(error.rule, error.where, error.message))
            continue
        table[row] = len(example.input_ids), len(example.images), example.num_supervised
    return table, skips


def _measured(reader: ExampleReader, numbers: np.ndarray, workers: int) -> Any:
    """(start, table, skips) for each chunk of `numbers`, in order."""
    starts = range(0, len(numbers), CHUNK)
    chunks = [numbers[start : start + CHUNK] for start in starts]
    if workers == 0 or len(chunks) < 2 * workers:
        for start, chunk in zip(starts, chunks, strict=True):
            yield start, *measure(reader, chunk)
        return
    context = multiprocessing.get_context("spawn")  # a forked child would inherit torch's threads in a broken state
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_keep_reader, initargs=(reader,)) as pool:
        for start, (table, skips) in zip(starts, pool.map(_measure_kept, chunks), strict=True):
            yield start, table, skips


_kept: list[ExampleReader] = []  # in a scanning process: its reader


def _keep_reader(reader: ExampleReader) -> None:
    _kept.append(reader)


def _measure_kept(numbers: np.ndarray) -> tuple[np.ndarray, list[Skip]]:
    return measure(_kept[0], numbers)


def _key(reader: ExampleReader) -> str:
    settings = {
        "sources": [
            (source.fingerprint, source.config.model_dump(mode="json"), source.image_placement)
            for source in reader.sources
        ],
        "tokenizer": reader.tokenizer.fingerprint(),
        "limits": [reader.max_length, reader.max_images, reader.over_long],
        "version": 1,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]


def _store(path: Path, table: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{secrets.token_hex(4)}.npz")
        np.savez(temporary, table=table)
        temporary.replace(path)
    except OSError as error:
        warn(f"data.cache: cannot write to {path.parent} ({error.strerror}); records are measured again next time")


def _refuse_unsupervised(scan: Scan) -> None:
    """A wrong template must stop the run at its start, not train on nothing."""
    rules = {skip.rule for skip in scan.skips}
    if len(scan.skips) < len(scan) or rules != {"no_supervised_tokens"}:
        return
    source, local = scan.reader.locate(0)
    ids, labels = scan.reader.tokenizer.encode(source.conversation(local))
    shown = scan.reader.tokenizer.text(ids[:60])
    learned = scan.reader.tokenizer.text([label for label in labels if label != IGNORE_INDEX])
    raise DataError(
        f"0 of {len(scan)} samples have supervised tokens. Usually the records' roles or data.template are not what "
        f"they seem. The first record is {shown!r}, of which {learned!r} would be learned"
    )
