"""Run a function of a test module on several processes, and runs of engines inside it.

`launch(function, argument)` calls `function(argument)` on each of them, inside their process group. Commands that are
launchers themselves are run by `run_launcher`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from warm import run_warm


def launch(function: Callable[[Any], None], argument: Any, nproc: int = 2) -> None:
    code, output = run_warm(_in_group, function, argument, nproc=nproc)
    assert code == 0, output[-6000:]


def _in_group(function: Callable[[Any], None], argument: Any) -> None:
    import torch

    from vlm.cli.process import end
    from vlm.distributed import process_group

    with process_group(torch.device("cpu"), 120.0, always=True):
        function(argument)
    end(0)


def run_launcher(
    command: list[str], environment: dict[str, str] | None = None, timeout: float = 200.0
) -> subprocess.CompletedProcess[str]:
    """What it printed and its exit status. After `timeout` seconds it is asked to end, with its processes."""
    launcher = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    try:
        out, errors = launcher.communicate(timeout=timeout)
    except BaseException:
        launcher.terminate()  # a launcher that is killed leaves its processes behind, each in a group of its own
        try:
            out, errors = launcher.communicate(timeout=45)
        except subprocess.TimeoutExpired:
            kill_tree(launcher.pid)
            raise
        print(out[-3000:], errors[-6000:], file=sys.stderr)
        raise
    return subprocess.CompletedProcess(command, launcher.returncode, out, errors)


def kill_tree(process: int) -> None:
    """A process and all that it started, their children first."""
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        for child in children.read_text().split():
            kill_tree(int(child))
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def make(path: str, options: list[str]) -> Any:
    """A run that has not begun (`Prepared`) of a config, on the CPU."""
    import torch

    from vlm.config import load_config
    from vlm.prepare import prepare_run

    torch.manual_seed(0)
    return prepare_run(load_config(path, options), torch.device("cpu"))


def advance(run: Any, start: int, stop: int) -> list[Any]:
    """Make the steps [start, stop) of a run. Returns their outputs."""
    from vlm.train.loop import TrainLoop

    outputs: list[Any] = []
    TrainLoop(
        engine=run.engine,
        objective=run.objective,
        stream=run.data.train,
        schedule=lambda step: 1.0,
        max_steps=stop,
        report=lambda step, batches, output, counts, seconds: outputs.append(output),
        save=lambda step, required: True,
    ).run(start)
    return outputs


def save(run: Any, folder: Path) -> None:
    from vlm.distributed import barrier, is_main

    if is_main():
        folder.mkdir(parents=True)
    barrier()
    run.engine.save(folder)
    barrier()
