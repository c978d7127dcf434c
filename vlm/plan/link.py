"""How fast processes of this machine sum a tensor over gloo, as ranks on a CPU do: two of them try it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta

from vlm.logs import warn

_NUMBERS = 4_000_000  # float32; a bucket of gradients is as large
_ROUNDS = 8
_TIMEOUT = 60.0  # seconds for both together


def measure_link() -> float | None:
    """Bytes a second that a process sends in an all-reduce; None, with a warning, where the two do not meet."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "vlm.plan.link", folder, str(rank)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        try:
            (out, _), (_, _) = (rank.communicate(timeout=_TIMEOUT) for rank in ranks)
            return float(out)
        except (subprocess.TimeoutExpired, ValueError) as error:
            warn(f"plan: two processes on this machine could not sum a tensor: {error}")
            return None
        finally:
            for rank in ranks:
                rank.kill()
                rank.communicate()


def _sum(folder: str, rank: int) -> None:
    """What each of the two does; the first one prints."""
    import torch
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = timedelta(seconds=_TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2, timeout=timeout)
    gradients = torch.ones(_NUMBERS)
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        dist.all_reduce(gradients)
        seconds.append(time.perf_counter() - started)
    dist.destroy_process_group()
    if rank == 0:
        print(gradients.nbytes / min(seconds))  # of two ranks, each sends as much as the tensor holds


if __name__ == "__main__":
    _sum(sys.argv[1], int(sys.argv[2]))
