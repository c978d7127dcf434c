"""Which number format is chosen, from what, and that the choice is kept."""

import json
import os
import time
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from warm import started

from vlm import precision
from vlm.errors import ConfigError
from vlm.models import vision_compute
from vlm.models.vision_compute import EncoderCompute, choose_compute, is_convolutional, read_compute
from vlm.precision import CpuSpeed

CPU = torch.device("cpu")
OLDER, NEWER = CpuSpeed(0.0125, 0.1), CpuSpeed(4.3, 0.8)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Pretends to be on a machine of a given speed, with nothing measured yet."""
    monkeypatch.setenv("VLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(precision, "_remembered", {})
    return lambda speed: monkeypatch.setattr(precision, "_measure_cpu", lambda: speed)


@pytest.mark.parametrize(("speed", "expected"), [(OLDER, "fp32"), (NEWER, "bf16")])
def test_auto_takes_what_is_faster_in_matrix_products(machine, speed, expected):
    machine(speed)
    assert precision.resolve("auto", CPU) == expected
    assert precision.resolve("bf16", CPU) == "bf16"  # what the config says is done


def test_the_line_of_the_log_gives_the_measured_ratios(machine):
    machine(OLDER)
    assert precision.describe("auto", "fp32", CPU) == (
        "precision: fp32, as on this CPU bfloat16 is, against float32: "
        "matrix product 80x slower, depthwise convolution 10x slower"
    )


def test_bf16_where_it_is_emulated_is_warned_of_with_the_factor(machine):
    machine(OLDER)
    assert "80 times slower than fp32" in precision.complaint("bf16", CPU)
    assert precision.complaint("fp32", CPU) == ""


def test_bf16_where_it_is_fast_is_not_warned_of(machine):
    machine(NEWER)
    assert precision.complaint("bf16", CPU) == ""


def test_float16_is_refused_on_a_cpu():
    with pytest.raises(ConfigError, match=r"train\.precision fp16 needs a GPU"):
        precision.resolve("fp16", CPU, "train.precision")


def test_auto_has_no_dtype_before_it_is_resolved():
    with pytest.raises(KeyError):
        precision.autocast_dtype("auto")


def test_what_was_measured_is_read_by_the_next_process(machine, monkeypatch):
    machine(OLDER)
    precision.cpu_speed()
    monkeypatch.setattr(precision, "_remembered", {})  # as a new process has it
    machine(NEWER)
    assert precision.cpu_speed() == OLDER


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": "cpu on another machine", "value": {}}'])
def test_a_damaged_memory_is_measured_again(machine, monkeypatch, content):
    machine(OLDER)
    precision.cpu_speed()
    (file,) = precision.machine_folder().glob("*.json")
    file.write_text(content)
    monkeypatch.setattr(precision, "_remembered", {})
    machine(NEWER)
    assert precision.cpu_speed() == NEWER
    assert json.loads(file.read_text())["value"]["matrix_product"] == 4.3


def test_a_cache_that_cannot_be_written_costs_a_measurement_only(machine, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLM_CACHE_DIR", str(tmp_path / "file"))
    machine(NEWER)
    assert precision.cpu_speed() == NEWER


def print_remembered():
    print(precision.remember("x", lambda: [time.sleep(1), os.getpid()]))


@pytest.mark.slow
def test_processes_that_start_together_choose_alike(tmp_path):
    """Each would measure something else; the first one's result is everybody's."""
    with ExitStack() as stack:
        children = [stack.enter_context(started(print_remembered, VLM_CACHE_DIR=str(tmp_path))) for _ in range(3)]
        for child in children:
            child.wait(60)
            assert child.codes == [0], child.output
        (answer,) = {child.output for child in children}
    assert answer.startswith("[None, ")


def test_other_instructions_of_the_same_cpu_are_another_machine(monkeypatch):
    before = precision._machine_key()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert precision._machine_key() != before


def test_a_real_measurement_takes_a_moment_and_leaves_the_threads_as_they_were():
    threads = torch.get_num_threads()
    speed = precision._measure_cpu()
    assert speed.matrix_product > 0
    assert speed.depthwise_convolution > 0
    assert torch.get_num_threads() == threads


def test_autocast_to_float32_switches_one_around_it_off():
    matrix = torch.ones(2, 2)
    with precision.autocast("cpu", torch.bfloat16):
        assert (matrix @ matrix).dtype == torch.bfloat16
        with precision.autocast("cpu", None):
            assert (matrix @ matrix).dtype == torch.float32


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1)]
    return nn.Sequential(*layers).requires_grad_(False)


def test_three_convolutions_make_a_convolutional_network():
    assert is_convolutional(cnn())
    assert not is_convolutional(nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.Linear(8, 8)))  # a transformer's patches


@pytest.mark.parametrize("name", ["fp32", "fp32_channels_last", "bf16", "bf16_channels_last"])
def test_a_format_computes_the_same_features(name):
    pixels = torch.rand(2, 3, 12, 12)
    expected = cnn()(pixels)
    compute = read_compute(name)
    assert compute.name == name
    got = compute.run(cnn().to(compute.dtype), pixels)
    assert got.dtype == compute.dtype
    bound = 1e-6 if compute.dtype == torch.float32 else 6e-3  # worst seen 6e-8 and 3e-3
    assert (got.float() - expected).abs().max() < bound


def test_a_format_of_its_own_rules_within_the_autocast_of_the_rest():
    with precision.autocast("cpu", torch.bfloat16):
        assert EncoderCompute(torch.float32).run(cnn(), torch.rand(1, 3, 8, 8)).dtype == torch.float32


@pytest.mark.parametrize(
    ("speed", "dtype", "considered"),
    [
        (NEWER, torch.bfloat16, {"fp32", "fp32_channels_last", "bf16", "bf16_channels_last"}),
        (OLDER, torch.bfloat16, {"fp32", "fp32_channels_last"}),  # not even tried, which would take minutes
        (NEWER, torch.float32, {"fp32", "fp32_channels_last"}),
    ],
)
def test_the_fastest_of_what_is_worth_trying_is_taken(machine, monkeypatch, speed, dtype, considered):
    machine(speed)
    seen = []

    def time(trunk, image_size, candidates, device):
        seen.extend(candidate.name for candidate in candidates)
        return {name: 0.1 if name == "fp32_channels_last" else 0.2 for name in seen}

    monkeypatch.setattr(vision_compute, "_time", time)
    assert choose_compute(cnn(), 12, dtype, CPU).name == "fp32_channels_last"
    assert set(seen) == considered


def test_timing_leaves_the_weights_as_they_were(machine):
    machine(NEWER)
    trunk, expected = cnn(), cnn().state_dict()
    choose_compute(trunk, 12, torch.bfloat16, CPU)
    assert all(torch.equal(value, expected[name]) for name, value in trunk.state_dict().items())
