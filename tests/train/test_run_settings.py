"""Settings of a run that are not its model: where it goes on, what the console shows, switches of torch."""

from __future__ import annotations

import json

import pytest
import torch

from vlm.cli.main import main
from vlm.config import load_config
from vlm.errors import CheckpointError, ConfigError
from vlm.launch import asked_processes, ignored_settings
from vlm.logs import log, log_level, warn
from vlm.run import train
from vlm.train.checkpoint import list_checkpoints, newest_verified
from vlm.train.config import TrainConfig
from vlm.train.fragments import read_weights
from vlm.train.switches import torch_switches


@pytest.mark.slow
def test_a_run_goes_on_from_a_named_step_and_newer_checkpoints_are_set_aside(config_file, capsys):
    path = config_file(train__max_steps=6, train__save_every=2, train__keep_last=9, train__prove=False)
    run = train(load_config(path), path.read_text())
    expected, first = read_weights(newest_verified(run)), (run / "metrics.jsonl").read_text()
    with pytest.raises(SystemExit) as end:
        main(["train", str(path), "--resume", "step-000002", "--options", "train.log_level=warning"])
    assert end.value.code == 0
    assert "resuming" not in capsys.readouterr().err.splitlines()[-1]
    folders = sorted(folder.name for folder in (run / "checkpoints").iterdir() if folder.is_dir())
    assert folders == [
        f"step-{step:06d}{end}" for step, end in ((2, ""), (4, ""), (4, ".later"), (6, ""), (6, ".later"))
    ]
    got = read_weights(newest_verified(run))
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    losses = [[json.loads(line)["loss"] for line in text.splitlines()] for text in (
        first, (run / "metrics.jsonl").read_text())]  # fmt: skip
    assert losses[0] == losses[1]
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 3; there are: 2, 4, 6"):
        train(load_config(path), path.read_text(), resume_step=3)
    assert [info.step for info in list_checkpoints(run)] == [2, 4, 6]


def test_the_last_step_of_an_epoch_may_be_dropped_in_a_whole_run(config_file, capsys):
    path = config_file(train__epochs=1, train__max_steps=None, train__global_batch_size=10**4, train__prove=False)
    with pytest.raises(SystemExit) as end:
        main(["train", str(path), "--options", "data.drop_last=true"])
    assert end.value.code == 3
    assert "do not fill one step of train.global_batch_size 10000" in capsys.readouterr().err


@pytest.mark.slow
def test_a_work_dir_takes_the_place_of_output_dir_and_may_name_the_project(config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = config_file(train__max_steps=1, train__prove=False)
    with pytest.raises(SystemExit) as end:
        main(["train", str(path), "--work_dir", "work/${name}/a b", "--options", "name=toy"])
    assert end.value.code == 0
    assert (tmp_path / "work/toy/a b/checkpoints/step-000001").is_dir()
    assert not (tmp_path / "run").exists()


def test_switches_of_torch_hold_for_the_run_and_no_longer():
    config = TrainConfig(max_steps=1, tf32=True, deterministic=True)
    with torch_switches(config):
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.are_deterministic_algorithms_enabled()
    with torch_switches(TrainConfig(max_steps=1)):
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("level", "shown"), [("info", "a\nwarning: b\n"), ("warning", "warning: b\n"), ("error", "")]
)  # fmt: skip
def test_the_console_shows_lines_of_its_level_and_above(level, shown, capsys):
    with log_level(level):
        log("a")
        warn("b")
    assert capsys.readouterr().err == shown


def test_the_number_of_processes_may_come_from_the_environment(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert asked_processes() is None
    monkeypatch.setenv("NPROC_PER_NODE", "8")
    assert asked_processes() == 8
    monkeypatch.setenv("RANK", "0")  # a process of that launch
    assert asked_processes() is None
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("NPROC_PER_NODE", "all")
    with pytest.raises(ConfigError, match="NPROC_PER_NODE=all: expected a number"):
        asked_processes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "step"}, "needs decay_every"),
        ({"decay_every": 5}, "decay_every is of schedule step, but schedule is cosine"),
        ({"schedule": "linear", "decay_factor": 0.5}, "decay_factor is of schedule step"),
        ({"warmup_start_ratio": 1.5}, "less than or equal to 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(max_steps=1, **settings)


def test_what_the_launcher_was_told_and_nothing_reads_is_named(monkeypatch):
    assert ignored_settings() == []
    for name, value in (
        ("MIXED_PRECISION", "bf16"), ("DYNAMO_BACKEND", "NO"), ("USE_DEEPSPEED", "true"), ("DEEPSPEED_ZERO_STAGE", "2"),
        ("GRADIENT_ACCUMULATION_STEPS", "1"), ("USE_CPU", "False"),
    ):  # fmt: skip
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert ignored_settings() == [
        "--mixed_precision bf16 (train.precision)",
        "--use_deepspeed (engine.kind: zero)",
        "--zero_stage 2 (engine.stage)",
    ]
