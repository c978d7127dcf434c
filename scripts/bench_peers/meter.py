"""What every trainer is measured with: time, memory, and this machine's matrix product.

A peer may run in an environment of its own, so this needs torch and nothing of ours.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RESULT = "RESULT "  # begins the line of the output that holds a result as JSON
STATUS = Path("/proc/self/status")


@dataclass
class Task:
    """One measurement, in a process of its own."""

    job: str
    parts: str  # folder of models and records
    config: str  # file of ours
    options: list[str]  # overrides of it
    llava: str | None  # the same model as a folder of transformers' LlavaForConditionalGeneration
    device: str
    precision: str  # fp32 or bf16
    threads: int
    batch: int  # records per optimizer step, about
    tokens: int  # of a record, about
    samples: int  # records to measure, at least
    warmup: int  # optimizer steps before them
    checkpointing: bool  # blocks compute their activations again in the backward pass


@dataclass
class Result:
    """Of the measured steps together, but for `first_loss`."""

    records: int
    tokens: float  # of records
    supervised: float  # tokens with a label
    slots: float  # tokens computed, padding included
    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int  # resident in host memory, or allocated on the GPU
    matmul_flops: float  # per second of one CPU thread, or of the GPU
    first_loss: float | None  # of the first two records before any update, nats per supervised token
    phases: dict[str, float] = field(default_factory=dict)  # seconds, where known
    versions: str = ""


class Meter:
    """Adds up what passes between `start` and `stop`."""

    def __init__(self, device: str) -> None:
        self.is_on_gpu = device == "cuda"

    def start(self) -> None:
        if self.is_on_gpu:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):  # where the kernel does not let it, the peak is of the whole process
                Path("/proc/self/clear_refs").write_text("5")
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def stop(self) -> dict[str, Any]:
        """`cpu_seconds`, `wall_seconds` and `peak_bytes`."""
        if self.is_on_gpu:
            import torch

            torch.cuda.synchronize()
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        return {"cpu_seconds": cpu, "wall_seconds": wall, "peak_bytes": self._peak()}

    def _peak(self) -> int:
        if self.is_on_gpu:
            import torch

            return torch.cuda.max_memory_allocated()
        found = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text()) if STATUS.exists() else None
        return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def matmul_flops(device: str, precision: str) -> float:
    """The fastest of several square matrix products: floating-point operations per second of one CPU thread, counted in
    CPU time, so that a busy machine does not look slow; or of the GPU."""
    import torch

    side = 8192 if device == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        meter = Meter(device)
        meter.start()
        a @ b
        spent = meter.stop()
        best = max(best, 2 * side**3 / spent["wall_seconds" if device == "cuda" else "cpu_seconds"])
    return best


def read_task() -> Task:
    """Of the command line; sets the number of threads."""
    task = Task(**json.loads(sys.argv[1]))
    import torch

    torch.set_num_threads(task.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return task


def print_result(result: Result) -> None:
    print(RESULT + json.dumps(asdict(result)), flush=True)
