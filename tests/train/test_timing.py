import gzip
import json
import time

import pytest
import torch
from torch import nn

from vlm.cli.train import start_training
from vlm.train.timing import PHASES, StepTimer


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves: `clock.append(seconds)`."""
    passed = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: sum(passed))
    return passed


def test_time_is_of_the_innermost_phase_and_reading_starts_anew(clock):
    timer = StepTimer()
    with timer("forward_backward"):
        clock.append(1)
        with timer("encode"):
            clock.append(10)
        clock.append(2)
    clock.append(100)  # of no phase
    with timer("optimizer"):
        clock.append(4)
    assert timer.read() == {"forward_backward": 3, "encode": 10, "optimizer": 4}
    clock.append(100)
    with timer("data"):
        clock.append(5)
    assert timer.read() == {"data": 5}


def test_a_watched_module_counts_within_a_step_only(clock):
    class Slow(nn.Module):
        def forward(self, x):
            clock.append(10)
            return 1 / x

    timer, module = StepTimer(), Slow()
    timer.watch(module, "encode")
    module(1)  # as an evaluation between two steps does
    assert timer.read() == {}
    with timer("forward_backward"):
        clock.append(1)
        module(1)
        with pytest.raises(ZeroDivisionError):
            module(0)
        clock.append(1)
    assert timer.read() == {"forward_backward": 2, "encode": 20}


def test_a_phase_that_fails_ends_too(clock):
    timer = StepTimer()

    @timer("data")
    def read():
        clock.append(1)
        raise KeyError

    with pytest.raises(KeyError):
        read()
    clock.append(1)
    assert timer.read() == {"data": 1}


def test_what_the_device_has_not_reached_counts_in_the_next_line(monkeypatch):
    class Event:
        """Reached `at` its number of milliseconds, once the device is that far."""

        device, made = 0, 0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = Event.made = Event.made + 1000

        def query(self):
            return self.at <= Event.device

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = StepTimer(torch.device("cuda"))
    for phase in ("forward_backward", "optimizer"):
        with timer(phase):
            pass
    Event.device = 3000  # the optimizer has begun
    assert timer.read() == {"forward_backward": 1.0}
    Event.device = 4000
    assert timer.read() == {"optimizer": 1.0}


@pytest.mark.slow
def test_metrics_break_a_step_down_and_a_profile_names_the_costliest_operations(config_file, tmp_path, capsys):
    path = config_file(train__max_steps=5, train__save_every=2, train__prove=False)
    start_training(str(path), [], profile_steps=2)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_seconds" in line]
    keys = [f"{phase}_seconds" for phase in PHASES]
    for line in steps:
        assert sum(line[key] for key in keys) <= line["step_seconds"] * 1.001
        assert line["encode_seconds"] > 0
        assert line["forward_backward_seconds"] > 0
        assert line["optimizer_seconds"] > 0
    assert [line["save_seconds"] > 0 for line in steps] == [False, False, True, False, True]  # in the line after it
    shown = capsys.readouterr().err
    assert "fwd+bwd" in shown
    table = shown.partition("profile of steps 3 to 4: ")[2].splitlines()
    assert table[1].split()[:3] == ["operation", "calls", "ms"]
    assert sum("%" in row for row in table[2:12]) == 10
    with gzip.open(tmp_path / "run/profile/steps-3-4.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"step: data", "step: encode", "step: forward_backward", "step: optimizer", "aten::mm"} <= names


@pytest.mark.slow
def test_a_run_too_short_to_profile_says_so(config_file, tmp_path, capsys):
    start_training(str(config_file(train__max_steps=2, train__prove=False)), [], profile_steps=3)
    assert "--profile: this run has 2 steps to make, and the first two are not recorded" in capsys.readouterr().err
    assert not (tmp_path / "run/profile").exists()
