"""Starting several processes with torchrun, and ending with the exit code of the one that failed."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from vlm.errors import ConfigError
from vlm.logs import log


@dataclass(frozen=True)
class Launch:
    processes: int  # on this machine
    nodes: int = 1
    endpoint: str | None = None  # host:port where the machines meet
    max_restarts: int = 0

    def torchrun_arguments(self) -> list[str]:
        if self.nodes > 1 and self.endpoint is None:
            raise ConfigError(f"--nnodes {self.nodes} needs --rdzv-endpoint host:port, the same on every machine")
        meeting = ["--standalone"]
        if self.endpoint is not None:
            meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={self.endpoint}", "--rdzv-id=vlm"]
        return [
            f"--nnodes={self.nodes}",
            f"--nproc-per-node={self.processes}",
            f"--max-restarts={self.max_restarts}",
            *meeting,
        ]


def launch(how: Launch, arguments: Sequence[str]) -> int:
    """Run `vlm <arguments>` in every process. Returns the exit code of the first process that failed, or 0."""
    command = [*how.torchrun_arguments(), "-m", "vlm.cli.main", *arguments]
    log(f"torchrun {shlex.join(command)}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // how.processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds to finish a step and save after SIGTERM
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(command))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
