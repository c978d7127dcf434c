"""`vlm train --profile N`: a trace of N steps, and the operations that took most of their time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vlm.distributed import is_main
from vlm.logs import log, warn

WARMUP_STEPS = 2  # not recorded: the first steps load kernels and make the optimizer's state
NUM_OPERATIONS = 10


class StepProfile:
    """Records `num_steps` steps after the first two of this launch, on rank 0. Call it after every step.

    Args:
        run: the run folder; the trace goes to `profile/` in it.
        start_step: finished steps when the launch begins.
        max_steps: finished steps when it ends, with which the recording ends too.
    """

    def __init__(self, run: Path, device: torch.device, *, start_step: int, max_steps: int, num_steps: int) -> None:
        self.run = run
        self.is_on_gpu = device.type == "cuda"
        self.first = start_step + WARMUP_STEPS  # finished steps when the recording begins
        self.last = min(self.first + num_steps, max_steps)
        if self.first >= max_steps:
            warn(f"--profile: this run has {max_steps - start_step} steps to make, and the first two are not recorded")
        self._profiler: Any = None

    def __call__(self, step: int) -> None:
        if step == self.last and self._profiler is not None:
            self._profiler.stop()
            self._write()
            self._profiler = None
        elif step == self.first < self.last and is_main():
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.is_on_gpu else [])]
            self._profiler = profile(activities=activities)
            self._profiler.start()

    def _write(self) -> None:
        trace = self.run / "profile" / f"steps-{self.first + 1}-{self.last}.json.gz"
        trace.parent.mkdir(exist_ok=True)
        self._profiler.export_chrome_trace(str(trace))
        log(f"profile of steps {self.first + 1} to {self.last}: {trace}, which https://ui.perfetto.dev opens")
        for line in costliest_operations(self._profiler.key_averages(), self.is_on_gpu):
            log(line)


def costliest_operations(averages: Iterable[Any], is_on_gpu: bool) -> list[str]:
    """A table of the operations that took most time themselves, without what they called.

    Args:
        averages: of torch's profiler, by operation.
        is_on_gpu: sort by the GPU's time; else by the CPU's.
    """
    found = [
        (each.self_device_time_total if is_on_gpu else each.self_cpu_time_total, each.count, each.key)
        for each in averages
        if each.device_type == DeviceType.CPU and not each.is_user_annotation  # kernels count in what launched them
    ]
    total = sum(microseconds for microseconds, _, _ in found) or 1.0
    rows = [f"{'operation':<44}{'calls':>9}{'ms':>12}{'share':>8}   ({'GPU' if is_on_gpu else 'CPU'} time)"]
    for microseconds, count, name in sorted(found, reverse=True)[:NUM_OPERATIONS]:
        rows.append(f"{name[:43]:<44}{count:>9,}{microseconds / 1000:>12,.1f}{microseconds / total:>8.1%}")
    return rows
