"""A launch that ended on purpose is not trained again by torchrun's --max-restarts."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
import typer

from vlm.cli.train import _ending_once
from vlm.errors import ConfigError, DistributedError, Preempted, RunLocked, TrainingDiverged, VLMError
from vlm.runs import summarize
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


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (None, "finished", ""),
        (Preempted("SIGTERM"), "stopped", ""),
        (TrainingDiverged("step 41: loss nan"), "failed", "step 41: loss nan"),
        (ValueError("a bug"), "failed", "ValueError: a bug"),
        (KeyboardInterrupt(), "interrupted", ""),
    ],
)
def test_a_launch_of_one_process_leaves_in_its_folder_how_it_ended(tmp_path, error, state, said):
    with suppress(VLMError, ValueError, KeyboardInterrupt), _ending_once(tmp_path), RunFolder(tmp_path):
        if error is not None:
            raise error
    assert (summarize(tmp_path).state, summarize(tmp_path).error) == (state, said)
    with RunFolder(tmp_path):  # a later one, killed
        os.utime(tmp_path / "run.owner.json", ns=(2**62, 2**62))
    assert summarize(tmp_path).state == "interrupted"


def test_a_folder_of_something_else_is_left_as_it_was(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError), _ending_once(tmp_path), RunFolder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
