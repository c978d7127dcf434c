"""vlm's own loop and engine, as `vlm train` runs them, without the proof; with checkpoints if they are frequent."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # scripts/

from bench_peers.meter import Meter, Result, Task, matmul_flops, print_result, read_task

LOSS_RECORDS = 2  # of the loss before any update; they fit one row


class Enough(Exception):
    """All records that were asked for are measured."""


class Measurement:
    """The loop's report. Counts after `warmup` steps, until `samples` records are done."""

    def __init__(self, task: Task) -> None:
        self.task, self.meter = task, Meter(task.device)
        self.counted = {"records": 0, "tokens": 0.0, "supervised": 0.0, "slots": 0.0}
        self.phases: dict[str, float] = {}
        self.spent: dict[str, Any] = {}

    def __call__(self, step: int, batches: Any, output: Any, counts: Any, seconds: Mapping[str, float]) -> None:
        if step > self.task.warmup:
            self.counted["records"] += sum(len(batch.where) for batch in batches)
            for key in ("tokens", "supervised", "slots"):
                self.counted[key] += getattr(counts, key)
            for phase, passed in seconds.items():
                self.phases[phase] = self.phases.get(phase, 0.0) + passed
            if self.counted["records"] >= self.task.samples:
                self.spent = self.meter.stop()
                raise Enough
        elif step == self.task.warmup:
            self.meter.start()


def measure(task: Task) -> Result:
    import torch
    import transformers

    from vlm.config import load_config
    from vlm.prepare import prepare_run
    from vlm.train.loop import Every, TrainLoop
    from vlm.train.resume import RunState
    from vlm.train.saving import CheckpointWriter

    torch.manual_seed(0)
    run = prepare_run(load_config(task.config, task.options), torch.device(task.device))
    first_loss = loss_of_first(run)
    measurement = Measurement(task)
    folder = tempfile.TemporaryDirectory(dir=task.parts)
    writer = CheckpointWriter(RunState(Path(folder.name), run.engine, "", {}, {}), run.config.train)
    loop = TrainLoop(
        engine=run.engine,
        objective=run.objective,
        stream=run.data.train,
        schedule=lambda step: 1.0,
        max_steps=sys.maxsize,
        report=measurement,
        save=lambda step, required: writer.save(step, required) is not None,
        events=[Every(1, writer.look)],
        save_every=run.config.train.save_every,
    )
    with folder:
        with suppress(Enough):
            loop.run()
        writer.close()
    return Result(
        **measurement.counted,
        **measurement.spent,
        matmul_flops=matmul_flops(task.device, task.precision),
        first_loss=first_loss,
        phases=measurement.phases,
        versions=f"torch {torch.__version__}, transformers {transformers.__version__}",
    )


def loss_of_first(run: Any) -> float:
    """Of the first records, packed into a row where the run packs, as their batches are."""
    stream = run.data.train
    examples = [stream.order.scan.reader.read(number) for number in range(LOSS_RECORDS)]
    rows = [examples] if stream.order.packing else [[example] for example in examples]
    loss, supervised = run.engine.evaluate(stream.collator(rows))
    return loss / supervised


if __name__ == "__main__":
    print_result(measure(read_task()))
