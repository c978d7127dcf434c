"""The training loop. It knows no device, wrapping, stage, LoRA, printing format or file name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from vlm.batch import Batch
from vlm.distributed import note
from vlm.errors import Preempted, TrainingDiverged
from vlm.faults import fault, set_step
from vlm.logs import log
from vlm.objectives.base import Objective
from vlm.train.engines.base import Engine, StepOutput

Event = Callable[[int], None]  # called with the number of finished optimizer steps


class Stream(Protocol):
    def iterate(self, start_step: int) -> Iterator[list[Batch]]: ...


@dataclass(frozen=True)
class StepCounts:
    """What a step holds, over all data ranks."""

    normalizer: float  # what the loss is divided by; of language modelling supervised tokens
    supervised: float  # tokens
    tokens: float
    slots: float  # tokens and padding
    images: float
    skipped: float  # records left out
    seen: float  # records, those left out included


class Roll(Protocol):
    def __call__(self, step: int, batches: list[Batch]) -> tuple[list[Batch], Mapping[str, float]]:
        """What a step learns from, made of what the stream brings, and numbers whose means over steps the log has.
        Every rank calls it.

        Args:
            step: from 0.
        """


def as_read(step: int, batches: list[Batch]) -> tuple[list[Batch], Mapping[str, float]]:
    """A step learns from what the stream brings."""
    return batches, {}


class Report(Protocol):
    def __call__(
        self, step: int, batches: list[Batch], output: StepOutput, counts: StepCounts, seconds: Mapping[str, float]
    ) -> None: ...


@dataclass
class Every:
    """An event and how many steps lie between two of them; None means never."""

    steps: int | None
    event: Event

    def __call__(self, step: int) -> None:
        if self.steps is not None and step % self.steps == 0:
            self.event(step)


def still_at(step: int, thaw: Mapping[str, int]) -> frozenset[str]:
    """Parts that stand still in a step.

    Args:
        step: from 0.
        thaw: part -> the step, from 0, from which on it trains.

    >>> sorted(still_at(1, {"vision": 2, "llm": 1}))
    ['vision']
    """
    return frozenset(part for part, at in thaw.items() if step < at)


@dataclass
class TrainLoop:
    """All that decides what a step is; `run` makes them.

    `max_bad_steps` steps whose loss or gradient is not finite may pass without an update before the run stops. A step
    whose scaled gradients overflowed in float16 passes without an update too, and is not one of them.
    """

    engine: Engine
    objective: Objective
    stream: Stream
    schedule: Callable[[int], float]  # optimizer step, from 0 -> factor of the learning rates
    max_steps: int
    report: Report
    # finished steps, and whether the run ends with it, so that it must succeed -> whether it is there already
    save: Callable[[int, bool], bool]
    stop_requested: Callable[[], str | None] = lambda: None  # the signal that asks to stop, agreed on by all ranks
    events: list[Every] = field(default_factory=list)  # run in order after a step
    save_every: int = 500
    max_bad_steps: int = 0
    is_over: Callable[[], bool] = lambda: False  # whether the run ends before `max_steps`, agreed on by all ranks
    thaw: Mapping[str, int] = field(default_factory=dict)  # part -> step, from 0, from which on it trains
    roll: Roll = as_read
    updates: int = 1  # of the weights in a step, all with the same batches

    def run(self, start_step: int = 0) -> int:
        """Train from `start_step` to `max_steps`, or until it `is_over`, and save at the end.

        Returns:
            the number of finished steps.

        Raises:
            TrainingDiverged: a non-finite loss or gradient norm, beyond `max_bad_steps`. No update was made with it.
            Preempted: SIGTERM or Ctrl-C; the step in work was finished and saved.
        """
        if self.is_over():
            log(f"nothing to train: the run ended after step {start_step}, as train.early_stop says")
            return start_step
        bad_steps = 0
        timer = self.engine.timer
        batches = self.stream.iterate(start_step)
        for step in range(start_step, self.max_steps):
            set_step(step + 1)
            note(f"step {step + 1}: reading data")
            fault("step")
            with timer("data"):
                microbatches = next(batches)
            note(f"step {step + 1}: computing")
            microbatches, said = self.roll(step, self.engine.broadcast(microbatches))
            counts = self._count(microbatches)
            self._settle_still(step, step == start_step)
            output = self._update(step, microbatches, counts.normalizer)
            if not output.applied and not output.overflowed:
                bad_steps += 1
                self._refuse(step + 1, output, microbatches, bad_steps)
            output = replace(output, told=said)
            self.report(step + 1, microbatches, output, counts, timer.read())
            for event in self.events:
                event(step + 1)
            finished = step + 1 == self.max_steps or self.is_over()
            stopping = self.stop_requested() is not None
            if finished or stopping or (step + 1) % self.save_every == 0:
                note(f"step {step + 1}: saving")
                with timer("save"):
                    saved = self.save(step + 1, finished or stopping)
                stopped = self.stop_requested()  # a signal may have arrived during the save
                if stopped and not finished:
                    if not saved:
                        self.save(step + 1, True)
                    raise Preempted(
                        f"{stopped}: stopped after step {step + 1} and saved; the same command resumes there"
                    )
                if finished:
                    return step + 1
        return start_step

    def _update(self, step: int, microbatches: list[Batch], normalizer: float) -> StepOutput:
        """What the last update of the step did; of those that follow one that is not finite none is made.

        Where nothing is supervised there is no update: AdamW would go on with what it has gathered.
        """
        if not normalizer:
            scale = None if self.engine.loss_scale is None else self.engine.loss_scale.factor
            nothing = dict.fromkeys(self.objective.metric_names, 0.0)
            return StepOutput(0.0, 0.0, applied=True, loss_scale=scale, metrics=nothing)
        for _ in range(self.updates):
            output = self.engine.train_step(microbatches, normalizer, self.schedule(step))
            if not output.applied and not output.overflowed:
                break
        return output

    def _settle_still(self, step: int, is_first: bool) -> None:
        self.engine.still = still_at(step, self.thaw)
        for part, at in self.thaw.items():
            if step == at:
                log(f"step {step + 1}: {part} trains from here on")
            elif is_first and step < at:
                log(f"{part} stands still for the first {at} steps")

    def _count(self, batches: list[Batch]) -> StepCounts:
        own = [
            sum(map(self.objective.normalizer, batches)),
            sum(batch.num_supervised for batch in batches),
            sum(batch.input_ids.numel() - batch.num_padding for batch in batches),
            sum(batch.input_ids.numel() for batch in batches),
            sum(batch.num_images for batch in batches),
            sum(len(batch.skipped) for batch in batches),
            sum(len(batch.where) + len(batch.skipped) for batch in batches),
        ]
        return StepCounts(*self.engine.sum_over_data_ranks([float(value) for value in own]))

    def _refuse(self, step: int, output: StepOutput, batches: list[Batch], bad_steps: int) -> None:
        if bad_steps > self.max_bad_steps:
            own = [where for batch in batches for where in batch.where]
            records = [where for each in self.engine.gather_from_data_ranks(own) for where in each]
            reason = "the learning rate is too high: lower train.learning_rate or lengthen the warm-up"
            if output.loss_scale is not None:
                reason += ", or the model's numbers are too large for float16: set train.precision to bf16 or fp32"
            raise TrainingDiverged(
                f"step {step}: loss {output.loss}, gradient norm {output.grad_norm}; no weight was changed by it. "
                f"Records of the step: {', '.join(records[:8])}{' ...' if len(records) > 8 else ''}. Usually "
                f"{reason}; train.max_bad_steps lets a few such steps pass"
            )
