"""What tests of objectives do with a run: stop it and go on, kill it, and start it on every engine."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import warm
from prove_engines import Case, work
from warm import run_warm

from vlm.config import load_config
from vlm.errors import Preempted
from vlm.run import train


def stop_and_go_on(path: Path, folder: Path, *first: str) -> Path:
    """The run folder of a config whose run is stopped after its first step that is saved, and then goes on.

    Args:
        folder: where it is, in place of the config's own.
        first: options until the stop.
    """
    options = [f"output_dir={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlm.run._agree_to_stop", lambda _: "SIGTERM")
        with pytest.raises(Preempted):
            train(load_config(path, [*options, *first]), path.read_text())
    return train(load_config(path, options), path.read_text())


def overrides(options: Sequence[str]) -> list[str]:
    return [part for option in options for part in ("--options", option)]


def kill(path: Path, *options: str, fault: str, nproc: int = 2) -> None:
    """`vlm train` on some processes, of which a fault kills one; the others see that it is gone."""
    with warm.started(warm.train, str(path), *overrides(options), nproc=nproc, VLM_FAULT=f"{fault}=kill") as ranks:
        ranks.wait(200)
        assert -signal.SIGKILL in ranks.codes, ranks.output[-3000:]
        assert None not in ranks.codes, f"a rank still waits for the killed one\n{ranks.output[-3000:]}"


def start_warm(job: Path, processes: int) -> None:
    """Starts a job of `scripts/prove_engines.py`, for `run_cases`."""
    code, output = run_warm(work, job, nproc=processes, timeout=500)
    assert code == 0, output[-6000:]


def train_with_engines(path: Path, engines: Sequence[str], folder: Path) -> dict[str, Path]:
    """The run folders of whole runs of a config, with engines written as for `Case`; those of one launch share it."""
    cases = [Case(engine) for engine in engines]
    runs = {case: folder / case.engine for case in cases}
    for launch in dict.fromkeys(case.launch for case in cases):
        group = [case for case in cases if case.launch == launch]
        options = [[*case.overrides, f"output_dir={runs[case]}"] for case in group]
        code, output = run_warm(_train_each, path, options, nproc=group[0].processes, timeout=500)
        assert code == 0, output[-6000:]
    return {case.engine: runs[case] for case in cases}


def _train_each(path: Path, options: Sequence[list[str]]) -> None:
    import torch

    from vlm.distributed import process_group

    with process_group(torch.device("cpu"), 60.0, always=True):
        for each in options:
            train(load_config(path, each), path.read_text())
