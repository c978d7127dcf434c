"""Batches in an order that is a pure function of (seed, epoch, index)."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vlm.batch import Batch, Example, Skip, microbatches_per_step
from vlm.data.balance import RowSizes, RowWork, deal
from vlm.data.collate import Collator
from vlm.data.lengths import load_array, store_array
from vlm.data.packing import Rows, group_by_length, pack_in_windows
from vlm.data.scan import Scan, usable_workers
from vlm.errors import RecordError

_ORDER, _WEIGHTS = 1, 2  # separate the random numbers of different uses
_MANY = 50_000  # records whose rows are kept in the cache; 0.1 s
_PACKED = "rows are packed"


@dataclass(frozen=True, eq=False)
class RowOrder:
    """Which records stand in which row of an epoch."""

    scan: Scan
    members: tuple[np.ndarray, ...]  # per source: the record numbers that take part
    weights: tuple[float, ...]  # per source
    seed: int
    max_length: int
    max_images: int
    packing: bool
    window: int
    shares_images: bool = False  # records that begin with one image share its tokens
    group_size: int = 0  # records of similar length that stand together, those of a step; 0 keeps them shuffled
    _rows: dict[int, Rows] = field(default_factory=dict, repr=False)  # of the epochs asked for last
    _num_rows: dict[int, int] = field(default_factory=dict, repr=False)

    @property
    def with_images(self) -> np.ndarray:
        """Record numbers that train and show images."""
        chosen = [members for members, weight in zip(self.members, self.weights, strict=True) if weight > 0]
        numbers = np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)
        return numbers[self.scan.num_images[numbers] > 0]

    def order(self, epoch: int) -> np.ndarray:
        """Record numbers of the epoch, shuffled; each source as often as its weight says."""
        chosen = []
        for number, (members, weight) in enumerate(zip(self.members, self.weights, strict=True)):
            whole = math.floor(weight)
            chosen += [members] * whole
            part = round((weight - whole) * len(members))
            if part:  # a window that moves on every epoch over a fixed shuffle: 0.5 takes the other half next time
                shuffled = members[np.random.default_rng([self.seed, _WEIGHTS, number]).permutation(len(members))]
                chosen.append(np.roll(shuffled, -epoch * part)[:part])
        records = np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)
        return records[np.random.default_rng([self.seed, _ORDER, epoch]).permutation(len(records))]

    def rows(self, epoch: int) -> Rows:
        """The epoch's rows of record numbers, in order. Two epochs are kept, so asking again costs nothing.

        Those of many records are kept in the cache too: a million take 2 s to pack.
        """
        if epoch not in self._rows:
            while len(self._rows) > 1:
                del self._rows[next(iter(self._rows))]
            self._rows[epoch] = self._make_rows(epoch)
            self._num_rows[epoch] = len(self._rows[epoch])
        return self._rows[epoch]

    def num_rows(self, epoch: int) -> int:
        """Kept for every epoch: a step is located by the numbers of all epochs before it."""
        return self._num_rows[epoch] if epoch in self._num_rows else len(self.rows(epoch))

    def _make_rows(self, epoch: int) -> Rows:
        if not self.packing:
            order = self.order(epoch)
            if self.group_size:
                seed = [self.seed, _ORDER, epoch]
                order = group_by_length(order, self.scan.lengths, self.group_size, seed=seed)
            return Rows(order, np.arange(1, len(order) + 1))
        store = self.scan.reader.store
        if store is None or sum(map(len, self.members)) < _MANY:
            return Rows.of(self._pack(epoch))
        path = store.folder / f"rows-{self._fingerprint}-{epoch}.npy"
        if (loaded := load_array(path, _PACKED)) is not None:
            num_rows = int(loaded[1])
            return Rows(loaded[0][num_rows:], loaded[0][:num_rows])
        rows = Rows.of(self._pack(epoch))
        store_array(path, np.concatenate([rows.ends, rows.numbers]), _PACKED, str(len(rows)))
        return rows

    @cached_property
    def _fingerprint(self) -> str:
        """Of all that decides which record stands in which row."""
        state = hashlib.sha256(
            repr([self.weights, self.seed, self.max_length, self.max_images, self.window, self.shares_images]).encode()
        )
        for array in (*self.members, self.scan.lengths, self.scan.num_images, self.scan.shares.firsts):
            state.update(np.ascontiguousarray(array).data)
        return state.hexdigest()[:16]

    def _pack(self, epoch: int) -> list[np.ndarray]:
        lengths, num_images = self.scan.sizes_in_row(self.shares_images)
        return pack_in_windows(
            self.order(epoch),
            lengths,
            num_images,
            max_length=self.max_length,
            max_images=self.max_images,
            window=self.window,
            seed=[self.seed, _ORDER, epoch],
            shares=self.scan.shares if self.shares_images else None,
        )

    def num_shared(self, epoch: int) -> tuple[int, int]:
        """Of an epoch: records that stand without the tokens they begin with, or whose second branch does, and how many
        tokens these are."""
        if not (self.packing and self.shares_images):
            return 0, 0
        rows = self.rows(epoch)
        shared = self._shared(rows) + self.scan.shares.within[rows.numbers]
        return int((shared > 0).sum()), int(shared.sum())

    def sizes(self, rows: Sequence[np.ndarray]) -> RowSizes:
        """What rows hold, counted from the scan alone. A row without records holds nothing."""
        scan, packed = self.scan, Rows.of(rows)
        numbers, shared = packed.numbers, self._shared(packed)
        in_row, images = (sizes[numbers].astype(np.int64) for sizes in scan.sizes_in_row(self.shares_images))
        lengths, within = scan.lengths[numbers].astype(np.int64), scan.shares.within[numbers].astype(np.int64)
        squares = np.where(within > 0, lengths**2 // 2 - (lengths - in_row) ** 2, lengths**2)  # of two branches alike
        return RowSizes(
            packed.sums(in_row - shared),
            packed.sums(squares - shared**2) // 2,
            packed.sums(np.where(shared == 0, images, 0)),
            packed.sums(scan.num_supervised[numbers]),
        )

    def _shared(self, rows: Rows) -> np.ndarray:
        """Tokens that each record leaves to the record before it in its row, int64 [records]."""
        shared = np.zeros(len(rows.numbers), dtype=np.int64)
        if self.packing and self.shares_images:
            keys, stems = self.scan.shares.keys[rows.numbers], self.scan.shares.stems[rows.numbers]
            is_branch = rows.follows[1:] & (keys[1:] == keys[:-1]) & (keys[1:] != 0)
            shared[1:] = np.where(is_branch, stems[1:], 0)
        return shared


class BatchStream:
    """Micro-batches of one data rank, step by step, over any number of epochs. Its whole state is the step number.

    A step takes `global_batch_size` rows of the epoch; the last step of an epoch is filled up with empty rows, or left
    out where the stream `drops_last`.
    Rank r of R takes the r-th of R equal parts of the step's rows, so that all ranks together always see the same
    rows in the same step, whatever R and the number of workers. With `work` the parts are equal in work too.

    Args:
        micro_batch_size: rows per `Batch`.
        work: what a row costs; None shares the rows out in their order.
        workers: processes that read records and decode images; 0 does so in this one.
    """

    def __init__(
        self,
        order: RowOrder,
        collator: Collator,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int = 0,
        num_data_ranks: int = 1,
        workers: int = 0,
        work: RowWork | None = None,
        drops_last: bool = False,
    ) -> None:
        self.microbatches_per_step = microbatches_per_step(global_batch_size, micro_batch_size, num_data_ranks)
        self.order = order
        self.collator = collator
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.data_rank = data_rank
        self.num_data_ranks = num_data_ranks
        self.workers = usable_workers(workers)
        self.work = work
        self.drops_last = drops_last
        self._dealt: tuple[int, list[np.ndarray]] = (-1, [])  # the step asked for last, and this rank's rows of it

    @cached_property
    def fingerprint(self) -> str:
        """Of all that decides which record stands where; a resumed run compares it. The same for a copy of the data."""
        return self._digest(lambda: self.order.scan.shares.firsts)

    @property
    def earlier_fingerprint(self) -> str:
        """What earlier versions wrote into checkpoints: it names the folder that the images lie in."""
        return self._digest(lambda: self.order.scan.shares.keys)

    def _digest(self, alike: Callable[[], np.ndarray]) -> str:
        order = self.order
        state = [
            [source.content_digest() for source in order.scan.reader.sources],
            order.scan.digest(), order.scan.reader.tokenizer.fingerprint(), order.seed, order.weights,
            order.max_length, order.max_images, order.packing, order.window,
            [hashlib.sha256(members.tobytes()).hexdigest() for members in order.members], self.global_batch_size,
        ]  # fmt: skip
        if order.shares_images:
            state.append(hashlib.sha256(alike().tobytes()).hexdigest())
        state += [f"groups of {order.group_size}"] if order.group_size else []
        state += ["drops last"] if self.drops_last else []
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]

    @property
    def fill(self) -> float:
        """Share of real tokens in the packed rows of the first epoch."""
        rows = self.order.rows(0)
        tokens = int(self.order.scan.lengths[rows.numbers].sum()) - self.order.num_shared(0)[1]
        return tokens / max(1, len(rows) * self.order.max_length)

    def for_rank(self, data_rank: int, num_data_ranks: int) -> BatchStream:
        """The same stream for another data rank, read in this process."""
        return self._changed(data_rank=data_rank, num_data_ranks=num_data_ranks, workers=0)

    def with_collator(self, collator: Collator) -> BatchStream:
        """The same rows as other batches."""
        return self._changed(collator=collator)

    def with_scan(self, scan: Scan) -> BatchStream:
        """The same rows, read through another view of the same records."""
        return self._changed(order=replace(self.order, scan=scan))

    def _changed(self, **changes: Any) -> BatchStream:
        names = (
            "order",
            "collator",
            "global_batch_size",
            "micro_batch_size",
            "data_rank",
            "num_data_ranks",
            "workers",
            "work",
            "drops_last",
        )
        return BatchStream(**{name: getattr(self, name) for name in names} | changes)

    def steps_in_epoch(self, epoch: int) -> int:
        rows = self.order.num_rows(epoch)
        return rows // self.global_batch_size if self.drops_last else -(-rows // self.global_batch_size)

    def steps_in(self, epochs: float) -> int:
        """Optimizer steps of so many epochs; a part of an epoch is rounded up to a step."""
        whole = math.floor(epochs)
        steps = sum(self.steps_in_epoch(epoch) for epoch in range(whole))
        return steps + math.ceil((epochs - whole) * self.steps_in_epoch(whole)) if epochs > whole else steps

    def epoch_at(self, step: int) -> float:
        """Epochs done after `step` optimizer steps."""
        epoch, within = self._locate(step)
        return epoch + within / self.steps_in_epoch(epoch)

    def iterate(self, start_step: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of this rank for step `start_step`, then for each step after it, without end."""
        first = start_step * self.microbatches_per_step
        self._locate(start_step)  # counts the rows of past epochs once, here, and not in every worker
        loader = DataLoader(
            _Microbatches(self),
            sampler=_CountFrom(first),
            batch_size=None,
            num_workers=self.workers,
            multiprocessing_context=_start_method() if self.workers else None,
            prefetch_factor=4 if self.workers else None,
            worker_init_fn=_outlive_a_signal,
            generator=torch.Generator(),  # its own: the loader must not draw from training's random state
        )
        batches = iter(loader)
        while True:
            yield [next(batches) for _ in range(self.microbatches_per_step)]

    def microbatch(self, number: int) -> Batch:
        """Micro-batch `number` of this rank, counted from the start of the run."""
        step, micro = divmod(number, self.microbatches_per_step)
        if self._dealt[0] != step:
            self._dealt = step, self.rows_of_step(step)
        start = micro * self.micro_batch_size
        return read_batch(self.order.scan, self._dealt[1][start : start + self.micro_batch_size], self.collator)

    def rows_of_step(self, step: int) -> list[np.ndarray]:
        """This rank's rows of record numbers in a step, from 0; empty ones fill up the last step of an epoch."""
        epoch, within = self._locate(step)
        start = within * self.global_batch_size
        packed = self.order.rows(epoch)
        rows = [packed[row] for row in range(start, min(start + self.global_batch_size, len(packed)))]
        rows += [np.zeros(0, dtype=np.int64)] * (self.global_batch_size - len(rows))
        if self.work is None:
            places = np.arange(len(rows)).reshape(self.num_data_ranks, -1)
        else:
            places = deal(self.work.of(self.order.sizes(rows)), self.num_data_ranks)
        return [rows[place] for place in places[self.data_rank]]

    def _locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within it)."""
        for epoch in itertools.count():
            steps = self.steps_in_epoch(epoch)
            if step < steps:
                return epoch, step
            step -= steps
        raise AssertionError("unreachable")


@dataclass(frozen=True)
class EvalBatches:
    """A finite set of batches, the same each time it is gone through; every R-th of them on each of R data ranks.

    All ranks go through equally many: the last ones may have empty rows only.
    """

    scan: Scan
    rows: list[np.ndarray]
    collator: Collator
    batch_size: int  # rows
    data_rank: int = 0
    num_data_ranks: int = 1

    def __len__(self) -> int:
        return -(-len(self.rows) // (self.batch_size * self.num_data_ranks))

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            yield read_batch(self.scan, self.rows_of(number), self.collator)

    def rows_of(self, number: int) -> list:
        """Record numbers of each row of this rank's batch `number`."""
        start = (number * self.num_data_ranks + self.data_rank) * self.batch_size
        return [self.rows[i] if i < len(self.rows) else () for i in range(start, start + self.batch_size)]

    def by_source(self) -> dict[str, EvalBatches]:
        """The batches of each source by its name, where rows hold records of one source each."""
        rows: dict[str, list[np.ndarray]] = {}
        for row in self.rows:
            rows.setdefault(self.scan.reader.locate(int(row[0]))[0].name, []).append(row)
        return {name: replace(self, rows=some) for name, some in rows.items()}


def read_batch(scan: Scan, rows: list, collator: Collator) -> Batch:
    """Read the records of `rows` (record numbers) and collate them. Records that broke since the scan are skipped."""
    examples: list[list[Example]] = []
    skips: list[Skip] = []
    for row in rows:
        kept = []
        for number in row:
            try:
                kept.append(scan.read(int(number)))
            except RecordError as error:
                skips.append(Skip(error.rule, error.where, error.message))
        examples.append(kept)
    return collator(examples, skips)


class _Microbatches(Dataset):
    def __init__(self, stream: BatchStream) -> None:
        self.stream = stream

    def __getitem__(self, number: int) -> Batch:
        return self.stream.microbatch(number)


class _CountFrom(Sampler):
    """start, start + 1, ... without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


def _start_method() -> str | None:
    """How worker processes begin. The server that forks them by default from Python 3.14 on dies of a signal to the
    whole group, and the workers with it; a plain fork has no such server."""
    return "fork" if sys.platform == "linux" else None


def _outlive_a_signal(_worker: int) -> None:
    """A signal to the whole process group must not take the workers from a run that still has to save.

    The first SIGTERM is let pass; a second one ends the worker as usual.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
