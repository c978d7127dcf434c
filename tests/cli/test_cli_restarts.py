"""A launch that ended on purpose is not trained again by torchrun's --max-restarts."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from vlm.cli.train import _ending_once
from vlm.errors import DistributedError, Preempted, RunLocked, VLMError
from vlm.train.runfolder import RunFolder


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One process of a launch, in its first life or a later one."""

    def start(restarts: int, error: VLMError | None = None, launcher: int = 7) -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        monkeypatch.setattr("os.getppid", lambda: launcher)
        with _ending_once(tmp_path):
            if error is not None:
                raise error

    return start


def test_what_was_stopped_ends_again_with_its_code_and_what_was_lost_is_trained_again(start):
    with pytest.raises(Preempted):
        start(0, Preempted("SIGTERM").on_every_rank())
    with pytest.raises(typer.Exit) as ended:
        start(1)
    assert ended.value.exit_code == 143
    start(0)  # the same command again trains
    with pytest.raises(DistributedError):
        start(0, DistributedError("rank 1 was lost"))
    start(1)


def test_a_launch_that_is_refused_leaves_the_one_that_runs_alone(start):
    with pytest.raises(RunLocked):
        start(0, RunLocked("in use").on_every_rank(), launcher=8)
    start(1)


def test_how_another_launch_ended_does_not_count(start):
    with pytest.raises(Preempted):
        start(0, Preempted("SIGTERM").on_every_rank(), launcher=8)
    start(1)


def test_a_launch_that_ended_before_its_config_was_written_leaves_a_folder_to_train_in(start, tmp_path):
    with pytest.raises(Preempted):
        start(0, Preempted("SIGTERM").on_every_rank())
    with RunFolder(str(tmp_path)) as run:
        assert run.path == tmp_path
