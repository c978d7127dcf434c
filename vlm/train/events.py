"""What happens around the steps of a run: lines, held-out loss, sampled answers, saves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from vlm.batch import Batch, Skip
from vlm.data.skips import SkipLog
from vlm.distributed import gather_objects, note, on_main, together
from vlm.errors import ConfigError, DataError, RecordError
from vlm.logs import log, warn
from vlm.models.vlm import VisionLanguageModel
from vlm.objectives.grpo import ClippedPolicy
from vlm.train.best import BestSoFar
from vlm.train.checkpoint import mark_best
from vlm.train.config import TrainConfig
from vlm.train.engines.base import StepOutput
from vlm.train.evaluate import Sums, held_out_sums
from vlm.train.loop import Every, StepCounts
from vlm.train.metrics import Reporter
from vlm.train.resume import RunState
from vlm.train.runfolder import RunFolder
from vlm.train.sampling import SampleQuestions
from vlm.train.saving import CheckpointWriter

Pixels = torch.Tensor | None
FAILED = "failed_gates"  # of a line of metrics.jsonl: texts, where all else are numbers


@dataclass(frozen=True)
class Measured:
    """What evaluation tasks say of the model that trains."""

    figures: dict[str, float]  # by the name that they have in metrics.jsonl, the first of each task under its name too
    failed_gates: list[str]


class HeldOut(Protocol):
    """Held-out records. `by_source` has their batches, by the name of their source."""

    def by_source(self) -> Mapping[str, Iterable[Batch]]: ...


@dataclass
class RunEvents:
    """The loop's callbacks, each over the same run."""

    settings: TrainConfig
    run: RunFolder
    state: RunState
    writer: CheckpointWriter
    reporter: Reporter
    skips: SkipLog
    questions: SampleQuestions
    assemble: Callable[[Path], VisionLanguageModel | None]  # checkpoint -> whole model; None if there is no room
    held_out: HeldOut | None
    counted: str = "tokens"  # what the normalizer counts
    measure: Callable[[VisionLanguageModel], Measured] | None = None  # train.eval_tasks; None: there are none
    best: BestSoFar | None = None  # train.keep_best
    failed_gates: list[str] = field(default_factory=list)  # of the last measurement, be it of an earlier launch
    _samples_wait: bool = False  # for the next checkpoint
    _tasks_wait: bool = False

    def periodic(self) -> list[Every]:
        return [
            Every(1, self.writer.look),
            Every(self.settings.eval_every, self.evaluate),
            Every(self.settings.sample_every, self.sample),
        ]

    def close(self) -> None:
        self.writer.close()
        self.reporter.close()

    def report(
        self, step: int, batches: list[Batch], output: StepOutput, counts: StepCounts, seconds: Mapping[str, float]
    ) -> None:
        self.reporter.record(step, output, counts, seconds)
        skips: list[Skip] = []
        if counts.skipped:
            own = [skip for batch in batches for skip in batch.skipped]
            skips = [skip for each in self.state.engine.gather_from_data_ranks(own) for skip in each]
        try:
            self.skips.add(skips, int(counts.seen), step)
        except DataError as error:
            raise error.on_every_rank() from None

    def is_over(self) -> bool:
        """Whether train.early_stop ends the run. Alike on all ranks."""
        patience = self.settings.early_stop
        return patience is not None and self.best is not None and self.best.num_since >= patience

    def evaluate(self, step: int) -> None:
        """Held-out loss per supervised token, or per pair or reply, of each source too, and the figures of tasks: into
        metrics.jsonl and the log. Tasks that no process can measure wait for the next save."""
        self._evaluate_loss(step)
        if self.measure is None:
            return
        note(f"step {step}: evaluation tasks")
        with self.state.engine.whole_model() as model:
            measured = None if model is None else self._measure(model, step)
        self._tasks_wait = measured is None
        if measured is not None:
            self._tell(step, measured, None)

    def _measure(self, model: VisionLanguageModel, step: int) -> Measured | None:
        """On all ranks. None where one ran out of memory. Each of them gets to the end of its own measurement, or to
        its error, before any goes on."""
        measured = gather_objects(together(lambda: self._unless_out_of_memory(model)))
        if None not in measured:
            return measured[0]
        torch.cuda.empty_cache()
        warn(f"step {step}: train.eval_tasks ran out of memory; they are tried again at the next save")
        return None

    def _unless_out_of_memory(self, model: VisionLanguageModel) -> Measured | None:
        assert self.measure is not None
        try:
            return self.measure(model)
        except torch.OutOfMemoryError:
            return None

    def _evaluate_loss(self, step: int) -> None:
        note(f"step {step}: held-out loss")
        by_source = {} if self.held_out is None else self.held_out.by_source()
        found: dict[str, Sums] = {}
        for name, batches in by_source.items():
            found[name], skips = held_out_sums(self.state.engine, batches)
            self.skips.list_held_out(skips, step)
        if not any(sums.normalizer for sums in found.values()):
            return
        first, *others = found.values()
        whole = sum(others, first)
        loss, *metrics = (value / whole.normalizer for value in whole.values)
        named = dict(zip(self.state.engine.objective.metric_names, metrics, strict=True))
        line: dict[str, Any] = {"step": step, "held_out_loss": loss, f"held_out_{self.counted}": whole.normalizer}
        if not isinstance(self.state.engine.objective, ClippedPolicy):  # its metrics are of rollouts
            line |= {f"held_out_{name}": value for name, value in named.items()}
        if len(found) > 1:
            each = {name: sums.values[0] / sums.normalizer for name, sums in found.items() if sums.normalizer}
            line |= {f"held_out_loss/{name}": value for name, value in each.items()}
        self.reporter.write(line)
        said = "".join(f", {name} {named[name]:.4f}" for name in ("accuracy", "margin") if name in named)
        log(f"step {step}: held-out loss {loss:.4f} over {whole.normalizer:,} {self.counted}{said}")
        self._follow(step, line, None)

    def _tell(self, step: int, measured: Measured, checkpoint: Path | None) -> None:
        """
        Args:
            checkpoint: that was measured; None: the model as it is now.
        """
        is_of_tasks = self.best is not None and not self.best.name.startswith("held_out_")
        if self.best is not None and is_of_tasks and self.best.name not in measured.figures:
            known = ", ".join(measured.figures)
            raise ConfigError(f"train.keep_best {self.best.name}: measured are {known}").on_every_rank()
        self.failed_gates = measured.failed_gates
        line = {"step": step, **measured.figures, FAILED: measured.failed_gates}
        self.reporter.write(line)
        said = ", ".join(f"{name} {value:.4f}" for name, value in measured.figures.items())
        log(f"step {step}: {said}")
        self._follow(step, line, checkpoint)

    def _follow(self, step: int, line: Mapping[str, Any], checkpoint: Path | None) -> None:
        """Keep the checkpoint of this step, if it is the best so far by `train.keep_best`."""
        best = self.best
        if best is None or best.name not in line:
            return
        if best.add(step, line[best.name]):
            checkpoint = checkpoint or self.writer.save(step, required=False, wait=True)
            if checkpoint is not None:
                on_main(lambda: mark_best(self.run.path, step))
                log(f"step {step}: the best so far by {best.name}, {best.value:.4f}: kept as {checkpoint}")
        elif self.is_over():
            log(f"step {step}: {best.num_since} times no better than {best.name} {best.value} of step {best.step}")

    def sample(self, step: int) -> None:
        """Answer the configured questions, into samples.jsonl and the log. Where no process can, at the next save."""
        note(f"step {step}: samples")
        with self.state.engine.whole_model() as model:
            if model is not None:
                self._answer(step, model, together)
            self._samples_wait = model is None and bool(self.settings.samples)

    def _answer(self, step: int, model: VisionLanguageModel, agree: Callable[[Callable[[], Pixels]], Pixels]) -> None:
        """`agree` runs what may fail: on all ranks that generate, so that they leave a question out together."""
        for question in self.settings.samples:
            try:
                pixel_values = agree(partial(self.questions.pixels, question))
                answer = self.questions.answer(model, question, pixel_values)
            except RecordError as error:
                warn(f"train.samples: {error}")
                continue
            self.run.append("samples.jsonl", {"step": step, **question.model_dump(), "answer": answer})
            log(f"step {step}: {question.image or ''} {question.prompt!r} -> {answer!r}")

    def save(self, step: int, required: bool) -> bool:
        """Write a checkpoint, or begin to; see `CheckpointWriter`.

        Returns:
            whether it is there: false too if it is still being written.
        """
        checkpoint = self.writer.save(step, required, wait=self._samples_wait or self._tasks_wait)
        if checkpoint is None:
            return False
        if self._tasks_wait:
            self._tasks_wait = False
            note(f"step {step}: evaluation tasks from the checkpoint")
            measured = on_main(lambda: self._measure_from(checkpoint, step))
            if measured is not None:
                self._tell(step, measured, checkpoint)
        if self._samples_wait:
            self._samples_wait = False
            note(f"step {step}: samples from the checkpoint")
            on_main(lambda: self._answer_from(checkpoint, step))
        return True

    def _measure_from(self, checkpoint: Path, step: int) -> Measured | None:
        assert self.measure is not None
        try:
            model = self.assemble(checkpoint)
            if model is not None:
                return self.measure(model)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        log(f"step {step}: train.eval_tasks are not measured, as the whole model does not fit here; vlm eval an export")
        return None

    def _answer_from(self, checkpoint: Path, step: int) -> None:
        try:
            model = self.assemble(checkpoint)
            if model is not None:
                self._answer(step, model, lambda compute: compute())
                return
        except torch.OutOfMemoryError:  # the weights fitted, what generating takes did not
            torch.cuda.empty_cache()
        log(f"step {step}: no samples, as the whole model does not fit here; ask an export of this run instead")
