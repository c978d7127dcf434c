"""What `vlm.runs` reads from run folders."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from vlm import runs
from vlm.errors import CheckpointError, DataError
from vlm.kept_config import read_kept_config
from vlm.runs import find_runs, is_locked, list_runs, read_series, summarize


def make_run(folder, *lines, train="{max_steps: 100, global_batch_size: 8}", owner=True):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"output_dir: {folder}\ntrain: {train}\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if owner:
        (folder / "run.owner.json").write_text('{"pid": 1, "host": "other"}')
    return folder


def step_line(step, loss=2.0, seconds=0.5, **more):
    return {"step": step, "epoch": step / 10, "loss": loss, "learning_rate": 1e-3, "step_seconds": seconds,
            "tokens_per_second": 100.0, "images_per_second": 4.0, **more}  # fmt: skip


def end(run, code, **more):
    (run / ".ended.json").write_text(json.dumps({"launch": 1, "code": code, **more}))


def test_rate_and_hours_left_come_from_the_last_lines(tmp_path):
    lines = [step_line(step, loss=step / 8, seconds=9.0 if step < 21 else 0.5) for step in range(1, 41)]
    summary = summarize(make_run(tmp_path / "run", *lines, {"step": 40, "held_out_loss": 1.5}))
    assert (summary.step, summary.max_steps, summary.loss, summary.held_out_loss) == (40, 100, 5.0, 1.5)
    assert (summary.step_seconds, summary.rows_per_second) == (0.5, 16.0)
    assert (summary.tokens_per_second, summary.images_per_second) == (100.0, 4.0)
    assert summary.hours_left == 60 * 0.5 / 3600
    assert summary.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("last_step", "ended", "state", "error"),
    [
        (100, None, "finished", ""),
        (100, {"code": 0}, "finished", ""),
        (40, None, "interrupted", ""),  # killed
        (40, {"code": 143}, "stopped", ""),  # SIGTERM or Ctrl-C: saved
        (40, {"code": 4}, "failed", "exit code 4"),
        (40, {"code": 4, "error": "step 41: loss nan"}, "failed", "step 41: loss nan"),
    ],
)
def test_a_run_that_does_not_run_has_finished_stopped_failed_or_was_interrupted(
    tmp_path, last_step, ended, state, error
):
    run = make_run(tmp_path / "run", step_line(last_step))
    if ended:
        end(run, **ended)
    assert (summarize(run).state, summarize(run).error) == (state, error)


def test_how_an_earlier_launch_ended_does_not_count(tmp_path):
    run = make_run(tmp_path / "run", step_line(40))
    end(run, 4)
    os.utime(run / ".ended.json", (1, 1))
    assert summarize(run).state == "interrupted"


def test_a_run_is_running_while_its_lock_is_held_and_looking_does_not_take_it(tmp_path):
    run = make_run(tmp_path / "run", step_line(100))
    assert not is_locked(run)
    assert not (run / "run.lock").exists()
    with FileLock(run / "run.lock", timeout=0):
        assert summarize(run).state == "running"
    with (run / "run.lock").open("rb") as another_reader:
        fcntl.flock(another_reader, fcntl.LOCK_SH)
        assert summarize(run).state == "finished"
    with FileLock(run / "run.lock", timeout=0):
        assert is_locked(run)


@pytest.mark.parametrize(
    ("train", "step", "epoch", "max_steps", "state"),
    [
        ("{epochs: 2}", 30, 0.75, 80, "interrupted"),
        ("{epochs: 2}", 80, 2.0, 80, "finished"),
        ("{epochs: 2}", 79, 1.9999, 80, "interrupted"),
        ("{max_steps: '${total}'}", 30, 0.75, None, "interrupted"),  # a reference to nothing
        ("{max_steps: '${oc.env:STEPS}'}", 30, 0.75, 90, "interrupted"),
    ],
)
def test_steps_of_a_run_that_counts_epochs_or_refers_to_its_number(
    tmp_path, monkeypatch, train, step, epoch, max_steps, state
):
    monkeypatch.setenv("STEPS", "90")
    run = make_run(tmp_path / "run", step_line(step) | {"epoch": epoch}, train=train)
    summary = summarize(run)
    assert (summary.max_steps, summary.state) == (max_steps, state)
    assert (summary.hours_left is None) == (max_steps is None)


def test_rows_per_step_are_the_default_where_the_config_does_not_say(tmp_path):
    summary = summarize(make_run(tmp_path / "run", step_line(1, seconds=2.0), train="{max_steps: 4}"))
    assert summary.rows_per_second == 32 / 2.0


def test_a_run_without_a_step_has_no_numbers_and_the_step_of_its_checkpoint(tmp_path):
    run = make_run(tmp_path / "run")
    assert (summarize(run).step, summarize(run).loss, summarize(run).hours_left) == (0, None, None)
    for name in ("step-000020", "step-000040", "step-000060.corrupt", ".tmp-step-000080-ab"):
        (run / "checkpoints" / name).mkdir(parents=True)
    assert summarize(run).step == 40
    (run / "metrics.jsonl").unlink()
    assert summarize(run).updated is None


def test_series_are_all_numbers_by_name_and_a_step_without_one_is_left_out(tmp_path):
    run = make_run(tmp_path / "run", step_line(1, 4.0), step_line(2, None), {"step": 2, "held_out_loss": 3.5},
                   step_line(3, 2.0, accuracy=0.5))  # fmt: skip
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # being written
    series = read_series(run)
    assert (series["loss"].steps, series["loss"].values) == ([1, 3], [4.0, 2.0])
    assert (series["held_out_loss"].steps, series["held_out_loss"].values) == ([2], [3.5])
    assert (series["accuracy"].steps, series["accuracy"].values) == ([3], [0.5])
    assert "step" not in series
    assert summarize(run).step == 3
    assert summarize(run).loss == 2.0


def test_series_are_parsed_again_only_when_the_file_changed(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", step_line(1, 4.0))
    parsed = []
    monkeypatch.setattr("vlm.runs._parse", lambda text, parse=runs._parse: parsed.append(len(text)) or parse(text))
    assert [read_series(run)["loss"].values for _ in range(3)] == [[4.0]] * 3
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_line(2, 3.0)) + "\n")
    assert [read_series(run)["loss"].values for _ in range(3)] == [[4.0, 3.0]] * 3
    assert len(parsed) == 2


def test_runs_are_found_below_a_folder_and_nothing_inside_a_run(tmp_path):
    make_run(tmp_path / "b/sft", step_line(10))
    make_run(tmp_path / "b/sft/export/run", step_line(10))  # inside a run
    make_run(tmp_path / "a", step_line(10), owner=False)  # copied without its owner
    make_run(tmp_path / ".trash/run", step_line(10))
    (tmp_path / "project").mkdir()
    (tmp_path / "project/config.yaml").write_text("a config that is not a run")
    assert [path.relative_to(tmp_path).as_posix() for path in find_runs(tmp_path)] == ["a", "b/sft"]
    assert [summary.step for summary in list_runs(tmp_path)] == [10, 10]
    assert find_runs(tmp_path / "a") == [tmp_path / "a"]


def test_what_is_not_a_run_is_named(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        find_runs(tmp_path / "none")
    with pytest.raises(DataError, match="is not a run folder"):
        summarize(tmp_path)
    with pytest.raises(DataError, match=r"metrics\.jsonl does not exist"):
        read_series(tmp_path)


def test_json_has_no_number_that_is_not_finite(tmp_path):
    run = make_run(tmp_path / "run", step_line(1, float("nan")))
    values = json.loads(json.dumps(summarize(run).as_json(), allow_nan=False))
    assert (values["loss"], values["step"], values["path"]) == (None, 1, str(run))


def test_a_summary_does_not_read_a_long_run_and_needs_no_torch(tmp_path):
    run = make_run(tmp_path / "run", *(step_line(step) for step in range(1, 20_001)))
    started = time.perf_counter()
    assert summarize(run).step == 20_000
    assert time.perf_counter() - started < 0.25  # 3 ms measured; the whole file takes 70
    code = "import sys, vlm.runs; print([name for name in ('torch', 'numpy', 'omegaconf') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "text",
    [
        "train: {max_steps: 2", "a: *x", "[1, 2]", "hello", "", "\0", "{" * 5000, "model: !!python/object:os.system {}",
        "a: 1\na: 2", "model: 3\ndata: 4", "model: ${x}\ndata: {}", "objective: {kind: [1]}\nmodel: {}\ndata: {}",
    ],
)  # fmt: skip
def test_an_unusable_config_of_a_run_is_named(tmp_path: Path, text: str):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    with pytest.raises(CheckpointError, match=f"{config} cannot be used .*It was edited, torn by a kill"):
        read_kept_config(config)
