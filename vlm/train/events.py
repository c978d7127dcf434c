"""What happens around the steps of a run: lines, held-out loss, sampled answers, saves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from vlm.batch import Batch, Skip
from vlm.data.skips import SkipLog
from vlm.distributed import note, on_main, together
from vlm.errors import DataError, RecordError
from vlm.logs import log, warn
from vlm.models.vlm import VisionLanguageModel
from vlm.train.config import TrainConfig
from vlm.train.engines.base import StepOutput
from vlm.train.evaluate import held_out_loss
from vlm.train.loop import Every, StepCounts
from vlm.train.metrics import Reporter
from vlm.train.resume import RunState
from vlm.train.runfolder import RunFolder
from vlm.train.sampling import SampleQuestions
from vlm.train.saving import CheckpointWriter

Pixels = torch.Tensor | None


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
    held_out: Iterable[Batch] | None
    counted: str = "tokens"  # what the normalizer counts
    _samples_wait: bool = False  # for the next checkpoint

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

    def evaluate(self, step: int) -> None:
        """Held-out loss per supervised token, or per pair or reply, into metrics.jsonl and the log."""
        note(f"step {step}: held-out loss")
        loss, count, skips = held_out_loss(self.state.engine, self.held_out or ())
        self.skips.list_held_out(skips, step)
        if count:
            self.reporter.write({"step": step, "held_out_loss": loss, f"held_out_{self.counted}": count})
            log(f"step {step}: held-out loss {loss:.4f} over {count:,} {self.counted}")

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
        checkpoint = self.writer.save(step, required, wait=self._samples_wait)
        if checkpoint is None:
            return False
        if self._samples_wait:
            self._samples_wait = False
            note(f"step {step}: samples from the checkpoint")
            on_main(lambda: self._answer_from(checkpoint, step))
        return True

    def _answer_from(self, checkpoint: Path, step: int) -> None:
        try:
            model = self.assemble(checkpoint)
            if model is not None:
                self._answer(step, model, lambda compute: compute())
                return
        except torch.OutOfMemoryError:  # the weights fitted, what generating takes did not
            torch.cuda.empty_cache()
        log(f"step {step}: no samples, as the whole model does not fit here; ask an export of this run instead")
