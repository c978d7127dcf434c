"""Seconds of an optimizer step, and hours of a run: what a step is made of (`vlm.plan.cost`) on a machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vlm.config import RunConfig
from vlm.plan.cost import Cost, Load, is_by_record, micro_batch
from vlm.plan.estimate import Plan
from vlm.plan.machine import Machine
from vlm.plan.numerics import full_rows
from vlm.plan.shapes import ModelShape
from vlm.train.engines.kind import FLOAT32, EngineKind
from vlm.train.engines.kinds import kind_of_launch

WAITING_FOR_RANKS = "waiting for ranks"
# bytes of a trained parameter that are read and written: AdamW's weight, gradient and two moments; the gradient's norm
# and its scaling; its sum with that of another micro-batch
_ADAM_BYTES, _CLIP_BYTES, _SUM_BYTES = 28, 12, 12


@dataclass(frozen=True)
class Records:
    """What an epoch has, as found in some of its records."""

    num_records: float
    num_rows: float
    row: Load  # mean of all rows


@dataclass(frozen=True)
class RunTime:
    """Of an optimizer step on each device, by what takes it, and of the whole run."""

    parts: dict[str, float]  # seconds; they add up
    samples: float | None  # records a step; None where the data is not known
    num_steps: int | None  # None where the data is not known and the config counts epochs

    @property
    def step(self) -> float:
        """Seconds."""
        return sum(self.parts.values())

    @property
    def hours(self) -> float | None:
        return None if self.num_steps is None else self.step * self.num_steps / 3600


def run_time(config: RunConfig, plan: Plan, machine: Machine, records: Records | None) -> RunTime:
    """
    Args:
        plan: the memory estimate of the same config; it knows shapes and devices.
        records: None takes full rows of one record each.
    """
    assert plan.shape is not None
    rows = config.train.global_batch_size
    row = full_row(config, plan.shape) if records is None else records.row
    steps = config.train.max_steps
    if steps is None and records is not None:
        steps = _steps_in(config.train.epochs or 1, round(records.num_rows) / rows, config.data.drop_last)
    samples = None if records is None else records.num_records / records.num_rows * rows
    return RunTime(step_parts(config, plan, machine, row), samples, steps)


def _steps_in(epochs: float, steps: float, drop_last: bool) -> int:
    """Optimizer steps, as `BatchStream.steps_in` counts them; `steps` is what the rows of one epoch fill.

    >>> _steps_in(3, 4.5, drop_last=False), _steps_in(3, 4.5, drop_last=True), _steps_in(0.5, 4.5, drop_last=False)
    (15, 12, 3)
    """
    each = math.floor(steps) if drop_last else math.ceil(steps)
    whole = math.floor(epochs)
    return max(1, whole * each + math.ceil((epochs - whole) * each))


def full_row(config: RunConfig, shape: ModelShape) -> Load:
    """A row as full as the config allows: one record, all of its text supervised."""
    work = full_rows(config, shape.tokens_per_image, rows=1)
    images = work.num_images
    return Load(images, work.length - images * shape.tokens_per_image, ((work.length, 1),))


def step_parts(config: RunConfig, plan: Plan, machine: Machine, row: Load) -> dict[str, float]:
    """Seconds of an optimizer step, by what takes them.

    Args:
        row: what a row of the data holds.
    """
    assert plan.shape is not None
    kind = kind_of_launch(config.engine, plan.world_size)
    rows, stages = plan.micro_batch_size, plan.num_stages
    num_micro = config.train.global_batch_size // (rows * plan.num_data_ranks)
    load = _rows(row, rows, config, plan.shape)
    pace = (num_micro + stages - 1) / stages  # stages share the work, and idle while the pipeline fills and empties
    parts = {name: pace * _seconds(cost, machine) for name, cost in micro_batch(config, plan.shape, load).items()}
    trained = plan.num_trained / stages
    shared = _ADAM_BYTES / kind.num_optimizer_shares(plan.num_data_ranks)
    moved = shared + _CLIP_BYTES + _SUM_BYTES * (num_micro - 1)
    parts["optimizer"] = machine.adam * trained * moved / _ADAM_BYTES
    computing = sum(parts.values())
    sent = _sent(kind, plan, num_micro, config.model.llm.quantization is not None)
    parts[WAITING_FOR_RANKS] = max(0.0, sent / machine.link - computing / 2)
    if plan.shape.vision is not None and not config.data.cache_features:
        each = machine.reading(load.image_pixels, plan.shape.vision.image_size)
        reading, workers = each * load.images * num_micro, config.data.workers
        parts["waiting for data"] = max(0.0, reading / workers - computing) if workers else reading
    return {name: seconds for name, seconds in parts.items() if seconds}


def _rows(row: Load, rows: int, config: RunConfig, shape: ModelShape) -> Load:
    """A micro-batch of rows that are like this one."""
    segments = tuple((length, count * rows) for length, count in row.segments)
    if not is_by_record(config, shape):  # masks of whole rows, padding computed
        segments = ((config.data.max_length if config.data.packing else row.tokens, rows),)
    return Load(row.images * rows, row.supervised * rows, segments, image_pixels=row.image_pixels)


def _seconds(cost: Cost, machine: Machine) -> float:
    return sum(machine.seconds(each) for each in cost.pieces)


def _sent(kind: EngineKind, plan: Plan, num_micro: int, is_packed: bool) -> float:
    """Bytes that a device sends in a step. Half of the computing is taken to go on meanwhile.

    Args:
        is_packed: the linear layers of the blocks are in 4 or 8 bits, and so in each process whole.
    """
    ranks = plan.num_data_ranks
    if ranks == 1:
        return 0.0
    share = (ranks - 1) / ranks
    gradients = FLOAT32 * plan.num_trained / plan.num_stages
    if kind.gathers:  # weights for each forward and backward, gradients once more
        assert plan.shape is not None
        llm = plan.shape.llm
        packed = len(llm.blocks) * sum(linear.inputs * linear.outputs for linear in llm.linears) if is_packed else 0
        weights = (plan.num_parameters - packed) * 2 / plan.num_stages
        return share * num_micro * (2 * weights + gradients)
    return 2 * share * gradients
