"""What gathering decoder blocks whole gives ZeRO stage 3: processor time of a step without and with it, in turn.

    python scripts/bench_zero3.py CONFIG --rounds 3

Two processes on this machine train the config, each for some steps without it and with it, as often as `--rounds` says.
Prints seconds of processor time of a step of rank 0, the ratio of their medians, and how far the losses are apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ENGINE = ("engine.kind=zero", "engine.stage=3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file or a shipped project")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="of each measurement; the first one is not counted")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.out is not None:
        work(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
        subprocess.run(
            [*launcher, *sys.argv[1:], "--out", str(out)], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True
        )
        measured = json.loads(out.read_text())
    off, on = ([run for run in measured if run["is_whole"] == is_whole] for is_whole in (False, True))
    seconds = [statistics.median(value for run in runs for value in run["seconds"]) for runs in (off, on)]
    apart = max(abs(a / b - 1) for a, b in zip(off[0]["losses"], on[0]["losses"], strict=True))
    print(f"layer by layer {seconds[0]:.3f} s of a processor per step and rank, blocks whole {seconds[1]:.3f}")
    print(f"ratio {seconds[0] / seconds[1]:.2f}, losses apart by {apart:.0e}")


def work(arguments: argparse.Namespace) -> None:
    """One rank of the launch."""
    from vlm.cli.process import end
    from vlm.config import load_config
    from vlm.distributed import is_main, process_group
    from vlm.train.engines.device import choose_device

    config = load_config(arguments.config, [*ENGINE, *arguments.options])
    device = choose_device(config.engine.device)
    with process_group(device, config.engine.timeout_seconds, always=True):
        measured = [
            measure(config, arguments.steps, device, is_whole)
            for _ in range(arguments.rounds)
            for is_whole in (False, True)
        ]
        if is_main():
            arguments.out.write_text(json.dumps(measured))
    end(0)


def measure(config: Any, steps: int, device: Any, is_whole: bool) -> dict[str, Any]:
    """Processor time of each step but the first, and all losses."""
    import torch

    from vlm.prepare import prepare_run
    from vlm.train.engines import zero
    from vlm.train.loop import TrainLoop

    gather = zero.gather_blocks_whole
    if not is_whole:
        zero.gather_blocks_whole = lambda model: None
    torch.manual_seed(config.seed)
    parts = prepare_run(config, device)
    zero.gather_blocks_whole = gather
    losses: list[float] = []
    times: list[float] = []

    def report(step: int, batches: Any, output: Any, counts: Any, seconds: Any) -> None:
        losses.append(output.loss)
        times.append(time.process_time())

    TrainLoop(
        engine=parts.engine,
        objective=parts.objective,
        stream=parts.data.train,
        schedule=lambda step: 1.0,
        max_steps=steps,
        report=report,
        save=lambda step, required: True,
    ).run()
    return {"is_whole": is_whole, "losses": losses, "seconds": [b - a for a, b in pairwise(times)]}


if __name__ == "__main__":
    main()
