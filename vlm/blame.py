"""`vlm blame`: make a step of a run again, and see which of its records it is to be blamed on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm.batch import IGNORE_INDEX
from vlm.config import RunConfig
from vlm.data.stream import read_batch
from vlm.errors import ConfigError
from vlm.logs import Progress, log_level
from vlm.prepare import Prepared, check_available, prepare_run
from vlm.proof.state import unchanged, without_dropout
from vlm.runs import METRICS, read_series
from vlm.settle import settle_precision
from vlm.train.checkpoint import CheckpointInfo, list_checkpoints, read_info
from vlm.train.engines.device import choose_device
from vlm.train.engines.kinds import Local
from vlm.train.loop import TrainLoop, still_at
from vlm.train.optim import build_schedule
from vlm.train.reference import REFERENCE, with_reference
from vlm.train.resume import RunState
from vlm.train.switches import torch_switches

_MOST_CHARACTERS = 60  # of a reply that is shown
SAME = 1e-3  # losses of a step that differ by less, relatively, are of one step: another engine rounds another way


@dataclass(frozen=True)
class BlamedRecord:
    """One record of the step, computed alone and without dropout by the weights before the step."""

    where: str  # file and record
    loss: float  # over the record's own normalizer; of language modelling nats per supervised token
    grad_norm: float  # of its share of the step's loss, before clipping
    num_supervised: int  # tokens
    score: float  # loss times gradient norm, each over the median of the step's records
    reply: str  # how what it supervises begins


@dataclass(frozen=True)
class Blame:
    """A step made again. `told_...` is what metrics.jsonl says of it, None where it has no line of this step alone."""

    step: int
    from_step: int  # of the checkpoint that was read; 0 is the start of the run
    loss: float
    grad_norm: float
    told_loss: float | None
    told_grad_norm: float | None
    records: list[BlamedRecord]  # the highest score first
    skipped: list[str]  # records of the step that could not be read

    @property
    def is_same(self) -> bool | None:
        """Whether the loss is the one that the run had; None where that is not known."""
        if self.told_loss is None:
            return None
        return math.isclose(self.loss, self.told_loss, rel_tol=SAME)

    def as_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite are None, as JSON has none."""
        records = [{name: _finite(value) for name, value in asdict(record).items()} for record in self.records]
        return {name: _finite(value) for name, value in {**asdict(self), "records": records}.items()}


def blame_step(config: RunConfig, step: int) -> Blame:
    """Make a step of a run again in this process, and compute each of its records alone.

    The order of records is a function of seed, epoch and index, and a checkpoint holds all that goes on: the newest
    one before the step is read, and the steps between are trained again. Nothing is written into the run folder.

    Args:
        config: the run's own, with its output_dir.
        step: as metrics.jsonl counts, from 1.

    Raises:
        ConfigError: the run has no such step.
        CheckpointError: the data, its order or the model is another one than the run's; or the file of its reference
            is missing.
    """
    device = choose_device(config.engine.device)
    run, engine = Path(config.output_dir), Local(device=config.engine.device)
    config = config.model_copy(update={"engine": engine})
    check_available(config, device)
    intact = [found for found in list_checkpoints(run) if not found.problems]
    before = [found for found in intact if found.step < step]
    with log_level("warning"), torch_switches(config.train):
        identity = read_info(intact[-1].path)["identity"] if intact else None
        config = settle_precision(config, device, identity)
        if config.objective.writes_replies:
            raise ConfigError(
                f"{run}: objective.kind {config.objective.kind} learns from replies that the model wrote itself; they "
                "are not made again here. rollouts.jsonl of the run has some of each step with their rewards"
            )
        torch.manual_seed(config.seed)
        parts = prepare_run(config, device, calibrate=not before)
        if not 1 <= step <= parts.max_steps:
            raise ConfigError(f"--step {step}: {run} has steps 1 to {parts.max_steps}")
        from_step = _restore(parts, run, before[-1]) if before else 0
        if config.objective.needs_reference:  # the run's own, so nothing is written
            data = with_reference(parts.data, config.data, parts.engine, run / REFERENCE, {}, resumes=True)
            parts = replace(parts, data=data)
        with log_level("info"):
            _train_until(parts, from_step, step - 1)
            return _blame(parts, run, from_step, step)


def _restore(parts: Prepared, run: Path, checkpoint: CheckpointInfo) -> int:
    settings = read_info(checkpoint.path).get("data", {})
    stream = parts.data.train
    state = RunState(
        run, parts.engine, stream.fingerprint, {}, settings, earlier_fingerprint=lambda: stream.earlier_fingerprint
    )
    return state.load(checkpoint.path)


def _train_until(parts: Prepared, start: int, last: int) -> None:
    """Make the steps after `start` again, `last` included."""
    if start >= last:
        return
    settings = parts.config.train
    with Progress(f"steps after step {start}", last - start, "steps") as progress:
        TrainLoop(
            engine=parts.engine,
            objective=parts.objective,
            stream=parts.data.train,
            schedule=build_schedule(settings, parts.max_steps),
            max_steps=last,
            report=lambda step, *_: progress.show(step - start),
            save=lambda step, required: True,
            save_every=last,
            max_bad_steps=settings.max_bad_steps,
            thaw=_thaw(parts),
        ).run(start)


def _thaw(parts: Prepared) -> dict[str, int]:
    return {str(part): at for part, at in parts.config.train.thaw.items()}


def _blame(parts: Prepared, run: Path, from_step: int, step: int) -> Blame:
    engine, stream, model = parts.engine, parts.data.train, parts.built.model
    batches = next(stream.iterate(step - 1))
    normalizer = max(1.0, float(sum(map(parts.objective.normalizer, batches))))
    numbers = np.concatenate(stream.rows_of_step(step - 1))
    model.train()
    engine.still = still_at(step - 1, _thaw(parts))
    with ExitStack() as stack:
        random_state = torch.get_rng_state()
        stack.enter_context(unchanged(model, parts.config.seed))
        torch.set_rng_state(random_state)  # dropout draws what it drew in the run
        whole = engine.rehearse(batches, normalizer, lambda: None)
        assert whole is not None  # the local engine can
        records = []
        stack.enter_context(without_dropout(model))
        with Progress(f"records of step {step}", len(numbers), "records") as progress:
            for count, number in enumerate(numbers.tolist(), 1):
                records += _blame_record(parts, number, normalizer)
                progress.show(count)
    series = read_series(run) if (run / METRICS).is_file() else {}
    told = [dict(zip(series[name].steps, series[name].values, strict=True)) if name in series else {}
            for name in ("loss", "grad_norm")]  # fmt: skip
    is_alone = step == 1 or step - 1 in told[0]  # else the line is the mean of several steps
    told_loss, told_grad_norm = (each.get(step) if is_alone else None for each in told)
    skipped = [f"{skip.where}: [{skip.rule}] {skip.message}" for batch in batches for skip in batch.skipped]
    return Blame(step, from_step, *whole[:2], told_loss, told_grad_norm, rank(records), skipped)


def _blame_record(parts: Prepared, number: int, step_normalizer: float) -> list[BlamedRecord]:
    """Empty for a record that cannot be read, or supervises nothing."""
    batch = read_batch(parts.data.train.order.scan, [[number]], parts.data.train.collator)
    own = float(parts.objective.normalizer(batch))
    if not batch.where or own == 0:
        return []
    found = parts.engine.rehearse([batch], step_normalizer, lambda: None)
    assert found is not None
    share, grad_norm, _ = found
    supervised = batch.labels[batch.labels != IGNORE_INDEX]
    reply = " ".join(parts.data.conversation_tokenizer.text(supervised.tolist()).split())[:_MOST_CHARACTERS]
    return [BlamedRecord(batch.where[0], share * step_normalizer / own, grad_norm, len(supervised), 0.0, reply)]


def rank(records: Sequence[BlamedRecord]) -> list[BlamedRecord]:
    """The same with their scores, the highest first; a loss or gradient that is not finite is above all."""
    losses, norms = ([value for value in values if math.isfinite(value)] for values in (
        [record.loss for record in records], [record.grad_norm for record in records]))  # fmt: skip
    middle_loss, middle_norm = (max(statistics.median(values or [0.0]), 1e-12) for values in (losses, norms))

    def score(record: BlamedRecord) -> float:
        product = record.loss / middle_loss * record.grad_norm / middle_norm
        return product if math.isfinite(product) else math.inf

    return sorted((replace(record, score=score(record)) for record in records), key=lambda record: -record.score)


def report(blame: Blame, top: int) -> list[str]:
    """What `vlm blame` prints."""
    from vlm.compare import lay_out

    start = f"the checkpoint of step {blame.from_step}" if blame.from_step else "the start of the run"
    lines = [
        f"step {blame.step}, from {start}: {len(blame.records)} records, loss {blame.loss:.4f}, gradient norm "
        f"{blame.grad_norm:.4g}"
    ]
    if blame.told_loss is None:
        lines.append(f"metrics.jsonl has no line of step {blame.step} alone to compare with (train.log_every)")
    else:
        norm = "" if blame.told_grad_norm is None else f", gradient norm {blame.told_grad_norm:.4g}"
        verdict = "the same" if blame.is_same else "NOT THE SAME"
        lines.append(f"metrics.jsonl says: loss {blame.told_loss:.4f}{norm}: {verdict}")
    if blame.is_same is False:
        lines.append(
            "another step was made than in the run: usually a model, image or library changed since, or the run had "
            "several processes, whose dropout draws other numbers"
        )
    rows = [["record", "score", "loss", "grad norm", "tokens", ""]]
    for each in blame.records[:top]:
        numbers = [f"{each.score:.1f}", f"{each.loss:.3f}", f"{each.grad_norm:.3g}", f"{each.num_supervised}"]
        rows.append([each.where, *numbers, each.reply])
    lines.append(lay_out(rows, left=(0, 5)))
    if len(blame.records) > top:
        lines.append(f"... and {len(blame.records) - top} more: --top {len(blame.records)}, or --json")
    return lines + [f"left out of the step: {line}" for line in blame.skipped]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
