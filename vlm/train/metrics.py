"""What a run reports: metrics.jsonl always, a live line on a terminal, trackers when asked, loss.png."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from vlm.curves import running_mean
from vlm.distributed import is_main
from vlm.errors import DataError
from vlm.logs import format_seconds, live, log
from vlm.train.config import TrainConfig
from vlm.train.engines.base import StepOutput
from vlm.train.loop import StepCounts
from vlm.train.runfolder import RunFolder
from vlm.train.timing import PHASES, ROLLOUTS, describe_shares
from vlm.train.trackers import Trackers, tracker_names

PLAIN_LINE_SECONDS = 10.0  # at most one progress line per this many seconds where there is no terminal


@dataclass
class Window:
    """Sums since the last line."""

    started: float = field(default_factory=time.monotonic)
    loss: float = 0.0  # these two times the normalizer of their step
    metrics: dict[str, float] = field(default_factory=dict)
    told: dict[str, float] = field(default_factory=dict)  # summed over steps
    normalizer: float = 0.0
    supervised: float = 0.0
    tokens: float = 0.0
    images: float = 0.0
    slots: float = 0.0  # tokens and padding
    bad_steps: int = 0
    overflowed_steps: int = 0
    steps: int = 0
    phases: dict[str, float] = field(default_factory=dict)  # seconds

    def add(self, output: StepOutput, counts: StepCounts, seconds: Mapping[str, float]) -> None:
        self.steps += 1
        self.overflowed_steps += output.overflowed
        self.bad_steps += not output.applied and not output.overflowed
        if output.applied:
            self.loss += output.loss * counts.normalizer
            for name, value in output.metrics.items():
                self.metrics[name] = self.metrics.get(name, 0.0) + value * counts.normalizer
            self.normalizer += counts.normalizer
            self.supervised += counts.supervised
        for name, value in output.told.items():
            self.told[name] = self.told.get(name, 0.0) + value
        self.slots += counts.slots
        self.tokens += counts.tokens
        self.images += counts.images
        for phase, passed in seconds.items():
            self.phases[phase] = self.phases.get(phase, 0.0) + passed


class Reporter:
    """Turns finished steps into lines. `record` once per optimizer step."""

    def __init__(
        self, run: RunFolder, settings: TrainConfig, schedule: Callable[[int], float],
        epoch_at: Callable[[int], float], *, start_step: int, max_steps: int,
    ) -> None:  # fmt: skip
        self.run = run
        self.max_steps = max_steps
        self.log_every = settings.log_every
        self.learning_rate = settings.learning_rate
        self.schedule = schedule
        self.epoch_at = epoch_at
        self.skipped = 0
        self._first_step = start_step
        self._started = time.monotonic()
        self._last_plain_line = 0.0
        self._window = Window()
        names = tracker_names(settings) if is_main() else []
        self._trackers = Trackers(names, run.path, settings.trackers_online)

    def record(self, step: int, output: StepOutput, counts: StepCounts, phases: Mapping[str, float]) -> None:
        """Add a finished step. Every `log_every` steps, a line: means over the steps since the last one.

        A step that was not applied counts in `bad_steps` or `overflowed_steps` and not in the loss.

        Args:
            phases: seconds since the step before, see `StepTimer`. So a save counts in the step after it.
        """
        window = self._window
        self.skipped += int(counts.skipped)
        window.add(output, counts, phases)
        if step % self.log_every and step != self.max_steps:
            return
        seconds = max(time.monotonic() - window.started, 1e-9)
        timed = [*PHASES, *([ROLLOUTS] if ROLLOUTS in window.phases else [])]
        line = {
            **{name: value / max(window.normalizer, 1) for name, value in window.metrics.items()},
            **{name: value / window.steps for name, value in window.told.items()},
            "step": step,
            "epoch": round(self.epoch_at(step), 4),
            "loss": window.loss / window.normalizer if window.normalizer else None,
            "grad_norm": output.grad_norm if output.applied else None,
            "learning_rate": self.learning_rate * self.schedule(step - 1),
            "supervised_tokens": int(window.supervised),
            "tokens_per_second": round(window.tokens / seconds, 1),
            "images_per_second": round(window.images / seconds, 2),
            "fill": round(window.tokens / max(window.slots, 1), 4),
            "data_share": round(window.phases.get("data", 0.0) / seconds, 4),
            "step_seconds": round(seconds / window.steps, 6),
            **{f"{phase}_seconds": round(window.phases.get(phase, 0.0) / window.steps, 6) for phase in timed},
            "skipped": self.skipped,
            "bad_steps": window.bad_steps,
            "memory_gib": round(_memory_gib(), 2),
            "seconds": round(time.monotonic() - self._started, 2),
        }
        if output.loss_scale is not None:
            line |= {"loss_scale": output.loss_scale, "overflowed_steps": window.overflowed_steps}
        self.write(line)
        self._show(line, describe_shares(window.phases, seconds))
        self._window = Window()

    def write(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl, and its numbers to the trackers."""
        self.run.append("metrics.jsonl", line)
        self._trackers.log(line["step"], line)

    def close(self) -> None:
        live("")
        self._trackers.close()

    def _show(self, line: dict[str, Any], shares: str) -> None:
        step, done = line["step"], line["step"] - self._first_step
        left = (time.monotonic() - self._started) / max(done, 1) * (self.max_steps - step)
        said = f"reward {line['reward']:.3f}  " if "reward" in line else ""
        text = (
            f"step {step}/{self.max_steps}  loss {_or_dash(line['loss'])}  {said}lr {line['learning_rate']:.2e}  "
            f"{line['tokens_per_second']:,.0f} tok/s  {line['images_per_second']:.1f} img/s  fill {line['fill']:.0%}  "
            f"{shares}  skipped {line['skipped']}  {line['memory_gib']:.1f} GiB  ETA {format_seconds(left)}"
        )
        if sys.stderr.isatty():
            live(text)
        elif time.monotonic() - self._last_plain_line >= PLAIN_LINE_SECONDS or step == self.max_steps:
            self._last_plain_line = time.monotonic()
            log(text)


def plot_loss(run: Path) -> Path:
    """Draw loss.png from metrics.jsonl: training loss, its running mean, and the held-out loss.

    Raises:
        DataError: there is no metrics.jsonl, or no step in it yet.
    """
    source = run / "metrics.jsonl"
    if not source.exists():
        raise DataError(f"{source} does not exist: {run} is not a run folder, or no step was made yet")
    lines = list(read_metrics(source))
    training = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    held_out = [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
    if not training:
        raise DataError(f"{source} has no training step yet")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.1, right=0.97, bottom=0.12, top=0.92)  # a layout that fits itself draws it twice
    steps, losses = zip(*training, strict=True)
    axes.plot(steps, losses, linewidth=0.8, alpha=0.4, label="training")
    axes.plot(steps, running_mean(losses), linewidth=1.5, label="training, running mean")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), marker="o", markersize=3, label="held out")
    axes.set(xlabel="optimizer step", ylabel="nats per supervised token", title="/".join(run.resolve().parts[-2:]))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run / "loss.png", dpi=120)
    return run / "loss.png"


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl. One that is being written, or was torn by a kill or a full disk, is left out."""
    for line in path.read_text("utf-8", "replace").split("\n"):
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _memory_gib() -> float:
    """Memory of this process, or the GPU's allocator peak where there is a GPU; GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30
