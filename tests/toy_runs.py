"""What tests of objectives do with a run: stop it and go on, and start it on every engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from prove_engines import work
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


def start_warm(job: Path, processes: int) -> None:
    """Starts a job of `scripts/prove_engines.py`, for `run_cases`."""
    code, output = run_warm(work, job, nproc=processes, timeout=500)
    assert code == 0, output[-6000:]
