"""What the model that a run starts from says of the replies of its data: computed once, kept with the run.

Objectives such as dpo compare each reply's log-probability with that under the model before the first step. The data
does not change, so neither do these numbers: one forward pass over all records before the first step serves every
epoch, and a step is one forward and backward of the model that trains. A run that goes on reads them again, as the
weights that made them are gone.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.build import Data, build_eval_batches
from vlm.data.config import DataConfig
from vlm.data.stream import EvalBatches
from vlm.distributed import gather_objects, on_main
from vlm.errors import CheckpointError
from vlm.faults import fault
from vlm.files import flush, replacing
from vlm.logs import Progress, log
from vlm.objectives.replies import ReplyScores
from vlm.train.engines.base import Engine

REFERENCE = "reference.safetensors"  # in the run folder
Tables = list[np.ndarray]  # of data.sources and data.eval_sources: float32 [n, 2], NaN where unknown


def with_reference(
    data: Data, config: DataConfig, engine: Engine, path: Path, start: Mapping[str, Any], resumes: bool
) -> Data:
    """The data with the reference's log-probabilities in every batch. Every rank of the launch calls this.

    Args:
        path: of the file that keeps them.
        start: all that decides what the model is before its first step, as JSON.
        resumes: whether the weights are a checkpoint's, so that they must be there already.

    Raises:
        CheckpointError: a run that goes on does not find them, or not those of its data.
    """
    digest = _digest(data, start)
    tables = on_main(lambda: _read(path, data, None if resumes else digest))
    if tables is None and resumes:
        raise CheckpointError(
            f"{path}: the log-probabilities of the model that this run started from are missing, damaged, or of other "
            "data, and its checkpoint cannot make them again. Usually the file was not copied with the run folder: put "
            "it back, or begin in another output_dir"
        ).on_every_rank()
    if tables is None:
        began = time.monotonic()
        tables = [
            score(engine, data, config, number, np.flatnonzero(scan.lengths)) for number, scan in enumerate(data.scans)
        ]
        count = sum(int(np.isfinite(table).sum()) for table in tables)
        log(f"reference: log-probabilities of {count:,} replies, computed once in {time.monotonic() - began:.1f} s")
        on_main(lambda: _write(path, tables, digest, _digest(data, {})))
    return data.with_reference(tables)


def with_reference_of(data: Data, config: DataConfig, engine: Engine, numbers: Iterable[int]) -> Data:
    """The data with the reference of some records of data.sources alone, for a look at the first of them."""
    table = score(engine, data, config, 0, np.array(sorted(numbers), dtype=np.int64))
    rest = [np.full((len(scan.lengths), 2), np.nan, dtype=np.float32) for scan in data.scans[1:]]
    return data.with_reference([table, *rest])


def score(engine: Engine, data: Data, config: DataConfig, number: int, records: np.ndarray) -> np.ndarray:
    """Log-probabilities of the replies of some records under the engine's model as it is, without dropout.

    Args:
        number: of the scan that the records are of.
        records: their numbers, int64 [k].

    Returns:
        float32 [n, 2], the preferred reply or the only one first; NaN for other records, for what cannot be read, and
        for a reply that is not there. The same on every rank.
    """
    scan = data.scans[number]
    table = np.full((len(scan.lengths), 2), np.nan, dtype=np.float32)
    batches = build_eval_batches(scan, records, config, data.train)
    if batches is None:
        return table
    own: list[tuple[int, list[float]]] = []
    with engine.using(ReplyScores()) as scores, Progress("reference", len(records), "records") as progress:
        for place, read in enumerate(batches):
            (batch,) = engine.broadcast([read])
            engine.evaluate(batch)
            fault("reference")
            if scores.found:  # of a pipeline the last stage alone has them
                own += _by_record(batches, place, batch.where, scores.found.pop().tolist())
            progress.show(min(len(records), (place + 1) * len(records) // len(batches)))
    for found in gather_objects(own):
        for record, values in found:
            table[record, : len(values)] = values
    return table


def _by_record(
    batches: EvalBatches, place: int, where: list[str], values: list[float]
) -> Iterable[tuple[int, list[float]]]:
    """Record numbers of a batch that could be read, with the values of their replies.

    Args:
        where: file and record of each reply.
    """
    scan, at = batches.scan, 0
    for number in (int(number) for row in batches.rows_of(place) for number in row):
        source, local = scan.reader.locate(number)
        count = 0
        while count < 2 and at + count < len(where) and where[at + count] == source.where(local):
            count += 1
        count = min(count, 2 if scan.reader.reads == "preference" else 1)
        if count:
            yield number, values[at : at + count]
        at += count


def _digest(data: Data, start: Mapping[str, Any], fingerprint: str | None = None) -> str:
    """fingerprint: None takes the data's own."""
    state = [dict(start), fingerprint or data.train.fingerprint, [scan.digest() for scan in data.scans]]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _read(path: Path, data: Data, digest: str | None) -> Tables | None:
    """None where there are none, they are damaged, or of another start or other data. `digest` None: of any start."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, "np") as file:
            written = file.metadata() or {}
            tables = [file.get_tensor(name) for name in sorted(file.keys())]
    except (SafetensorError, OSError):
        return None
    fits = [table.shape for table in tables] == [(len(scan.lengths), 2) for scan in data.scans]
    of = written.get("data")
    is_same = of == _digest(data, {}) or of == _digest(data, {}, data.train.earlier_fingerprint)
    is_whole = written.get("sum") == _sum(tables) and is_same
    return tables if fits and is_whole and digest in (None, written.get("digest")) else None


def _write(path: Path, tables: Tables, digest: str, data: str) -> None:
    """`digest` of data and start, `data` of the data alone. Raises OSError."""
    from safetensors.numpy import save_file

    with replacing(path, make_folder=False) as temporary:
        named = {f"scan-{number}": table for number, table in enumerate(tables)}
        save_file(named, temporary, metadata={"digest": digest, "data": data, "sum": _sum(tables)})
        flush(temporary)
    flush(path.parent)


def _sum(tables: Tables) -> str:
    return hashlib.sha256(b"".join(table.tobytes() for table in tables)).hexdigest()
