"""Run a function of a test module on several processes, and runs of engines inside it.

`launch(function, argument)` calls `function(argument)` on each of them, inside their process group.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent


def launch(function: Callable[[Any], None], argument: Any, nproc: int = 2) -> None:
    """`argument` travels as JSON. The function is found again by its name."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(sys.modules[function.__module__].__file__).parent), str(TESTS), str(TESTS.parent)]
        ),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", __file__]
    command += [function.__module__, function.__name__, json.dumps(argument)]
    done = run_launcher(command, environment)
    assert done.returncode == 0, done.stderr[-6000:]


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
        launcher.terminate()  # a launcher that is killed leaves its processes behind
        try:
            out, errors = launcher.communicate(timeout=45)
        except subprocess.TimeoutExpired:
            launcher.kill()
            raise
        print(out[-3000:], errors[-6000:], file=sys.stderr)
        raise
    return subprocess.CompletedProcess(command, launcher.returncode, out, errors)


def make(path: str, options: list[str]) -> Any:
    """A run that has not begun (`Prepared`) of a config, on the CPU."""
    import torch

    from vlm.config import load_config
    from vlm.prepare import prepare

    torch.manual_seed(0)
    return prepare(load_config(path, options), torch.device("cpu"))


def advance(run: Any, start: int, stop: int) -> list[Any]:
    """Make the steps [start, stop) of a run. Returns their outputs."""
    from vlm.train.loop import TrainLoop

    outputs: list[Any] = []
    TrainLoop(
        engine=run.engine,
        objective=run.objective,
        stream=run.data.train,
        learning_rate=lambda step: 1e-3,
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


if __name__ == "__main__":
    import torch

    from vlm.cli.main import end
    from vlm.distributed import process_group

    module, name, argument = sys.argv[1:]
    with process_group(torch.device("cpu"), 120.0, always=True):
        getattr(importlib.import_module(module), name)(json.loads(argument))
    end(0)
