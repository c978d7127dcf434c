"""Step time: what is counted (vlm.plan.cost) on machines whose numbers are round."""

from __future__ import annotations

import json
from dataclasses import replace

import bench_plan_time
import pytest
import torch
from conftest_plan import changed
from PIL import Image

from vlm.batch import ImageSpec
from vlm.cli.main import main
from vlm.errors import ConfigError
from vlm.plan import measure
from vlm.plan.alternatives import alternatives
from vlm.plan.cost import Attention, Load, Product, Sweep
from vlm.plan.estimate import GIB, Plan, estimate
from vlm.plan.link import measure_link
from vlm.plan.machine import DATA_SHEETS, Machine, machine_of_sheet
from vlm.plan.records import _draft_share, _pixels_of
from vlm.plan.report import alternatives_table, full_report, time_lines
from vlm.plan.step_time import Records, RunTime, full_row, run_time, step_parts

# a billion operations a second in any shape; a microsecond for a number; a millisecond for a call of attention
MACHINE = Machine(
    name="round",
    products=((1, 1, 1, 1e9),),
    sweeps=((1, 1e-6, 2e-6), (100, 1e-4, 2e-4)),
    attention=((64, 1e-3, 2e-3),),
    adam=1e-6,
    decode=0.5 / (640 * 480),
    fit=0.0,
    image=0.0,
    link=1e9,
)
ROW = Load(images=1, supervised=4, segments=((20, 1),))


@pytest.fixture
def plan(config) -> Plan:
    return estimate(config)


def test_each_kind_of_work_has_its_seconds():
    assert MACHINE.seconds(Product(10, 100, 1000, times=3)) == pytest.approx(3 * 2e6 / 1e9)
    assert MACHINE.seconds(Sweep(100, times=2)) == pytest.approx(2e-4)
    assert MACHINE.seconds(Sweep(1000, times=1, is_heavy=True)) == pytest.approx(2e-3)  # in proportion beyond the last
    assert MACHINE.seconds(Attention(64, width=512, times=5)) == pytest.approx(5 * 3e-3)
    assert MACHINE.seconds(Attention(128, width=1024, backwards=0)) == pytest.approx(4 * 2 * 1e-3)  # by the square


def test_between_measured_shapes_the_time_of_an_operation_is_in_between():
    machine = replace(MACHINE, products=((16, 8, 8, 1e9), (256, 8, 8, 4e9)))
    assert machine.seconds(Product(64, 8, 8)) == pytest.approx(2 * 64 * 64 * (1 / 1e9 + 1 / 4e9) / 2)


def test_a_step_is_its_micro_batches_and_one_update(config, plan):
    once = step_parts(config, plan, MACHINE, ROW)
    twice = step_parts(changed(config, train={"global_batch_size": 8}), plan, MACHINE, ROW)
    assert twice["decoder"] == pytest.approx(2 * once["decoder"])
    assert once["optimizer"] > MACHINE.adam * plan.num_trained
    assert once["waiting for data"] == pytest.approx(0.5 * 4)  # images of 4 rows, read in the training process
    assert "waiting for ranks" not in once


def test_workers_read_while_the_device_computes(config, plan):
    fast = step_parts(changed(config, data={"workers": 4}), plan, MACHINE, ROW)
    computing = sum(seconds for name, seconds in fast.items() if name != "waiting for data")
    assert fast["waiting for data"] == pytest.approx(max(0, 0.5 * 4 / 4 - computing))
    assert "waiting for data" not in step_parts(changed(config, data={"cache_features": True}), plan, MACHINE, ROW)


def test_a_pipelines_stages_share_the_work_and_idle_at_its_ends(config):
    staged = changed(config, engine={"kind": "pipeline", "num_stages": 2})
    alone, shared = (step_parts(each, estimate(each, n), MACHINE, ROW) for each, n in ((config, 1), (staged, 2)))
    assert shared["decoder"] == pytest.approx(alone["decoder"] * (2 + 1) / 2 / 2)  # of 2 micro-batches


def test_masks_of_whole_rows_cost_the_padding_too(config, plan):
    short = Load(supervised=1, segments=((5, 1),))
    dense = step_parts(config, plan, MACHINE, short)["decoder"]  # sdpa
    varlen = changed(config, model={"llm": {"path": config.model.llm.path, "attention": "varlen"}})
    assert step_parts(varlen, plan, MACHINE, short)["decoder"] < dense / 2


def test_hours_follow_from_steps_or_from_the_data(config, plan):
    found = run_time(config, plan, MACHINE, None)
    assert (found.num_steps, found.samples) == (2, None)
    assert found.hours == pytest.approx(found.step * 2 / 3600)
    epochs = changed(config, train={"max_steps": None, "epochs": 3})
    assert run_time(epochs, plan, MACHINE, None).hours is None
    known = run_time(epochs, plan, MACHINE, Records(num_records=1000, num_rows=200, row=ROW))
    assert (known.num_steps, known.samples) == (150, 20)  # 4 rows a step of 5 records each


def test_with_drop_last_an_epoch_has_the_steps_that_its_rows_fill(config, plan):
    rows = Records(num_records=100, num_rows=18, row=ROW)  # 4 rows a step
    for drop_last, steps in ((False, 5), (True, 4)):
        changes = changed(config, train={"max_steps": None, "epochs": 3}, data={"drop_last": drop_last})
        assert run_time(changes, plan, MACHINE, rows).num_steps == 3 * steps


def test_a_draft_of_a_jpeg_reads_all_bits_and_makes_fewer_pixels():
    """The rates of docs/benchmarks.md, for an encoder that sees 336 pixels: 1/2 of 1600 x 1200, 1/4 of 4000 x 3000."""
    spec = ImageSpec(size=336, mean=(0.5,) * 3, std=(0.5,) * 3, num_tokens=1)
    shares = [_draft_share(size, spec) for size in ((640, 480), (1600, 1200), (4000, 3000))]
    assert shares == pytest.approx([1, 0.31, 0.1375])


def test_the_files_that_a_draft_shrinks_are_jpegs(tmp_path):
    spec = ImageSpec(size=16, mean=(0.5,) * 3, std=(0.5,) * 3, num_tokens=1)
    paths = [str(tmp_path / f"a.{ending}") for ending in ("jpg", "png")]
    for path in paths:
        Image.new("RGB", (64, 64)).save(path)
    assert _pixels_of(paths, None) == [4096, 4096]
    assert _pixels_of(paths, spec) == pytest.approx([4096 * 0.31, 4096])


def test_an_image_is_read_by_the_pixels_of_its_file(config, plan):
    tiny = replace(ROW, image_pixels=64 * 48)  # a hundredth of 640 x 480
    assert step_parts(config, plan, MACHINE, tiny)["waiting for data"] == pytest.approx(0.005 * 4)
    fitting = replace(MACHINE, image=1.0, fit=1e-3)
    seen = plan.shape.vision.image_size**2
    assert fitting.reading(64 * 48, plan.shape.vision.image_size) == pytest.approx(1 + 0.005 + 1e-3 * seen)


def test_ranks_on_a_cpu_send_as_fast_as_two_of_them_were_measured_to(monkeypatch, tmp_path):
    monkeypatch.setenv("VLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("vlm.precision._remembered", {})
    numbers = {"when": "today", "one_thread": 0, "products": [[1, 1, 1, 1e9]], "sweeps": [], "attention": [], "adam": 1}
    numbers |= {"image": 1, "decode": 1, "fit": 1}
    monkeypatch.setattr(measure, "_measure", lambda *_: numbers)
    monkeypatch.setattr(measure, "measure_link", lambda: 2e9)
    cpu = torch.device("cpu")
    alone, several = (measure.measured_machine(cpu, torch.float32, has_ranks=ranks) for ranks in (False, True))
    assert (alone.link, alone.is_link_assumed) == (1e9, True)
    assert (several.link, several.is_link_assumed) == (2e9, False)


@pytest.mark.thorough
@pytest.mark.slow
def test_two_processes_sum_a_tensor():
    assert measure_link() > 1e7  # bytes a second; 1e9 is usual


def test_without_data_a_row_is_taken_for_full(config, plan):
    assert full_row(config, plan.shape) == Load(images=1, supervised=4, segments=((20, 1),))


def test_a_larger_gpu_is_faster_and_an_unknown_one_is_refused(config, plan):
    steps = [sum(step_parts(config, plan, machine_of_sheet(name), ROW).values()) for name in ("H100", "3090")]
    assert steps[0] < steps[1]
    big = Product(4096, 4096, 4096)
    for name, sheet in DATA_SHEETS.items():
        share = big.operations / machine_of_sheet(name).seconds(big) / (sheet.tflops * 1e12)
        assert 0.5 < share < 0.6, name
    with pytest.raises(ConfigError, match="--gpu B9000: expected one whose data sheet is known: H200"):
        machine_of_sheet("B9000")


def test_the_report_says_time_parts_and_what_is_assumed(config):
    lines = full_report(config, 1, 24 * GIB, "a card", machine_of_sheet("A100"), "no such file")
    (first,) = (line for line in lines if line.startswith("time: "))
    assert "a step" in first
    assert "for 2 steps" in first
    assert any("not measured: 60% of 312 bf16 TFLOPS" in line for line in lines)
    assert any("no such file" in line for line in lines)
    assert any("name the GPU" in line for line in full_report(config, 1, 24 * GIB, "a card"))


def test_lines_of_a_time_are_sorted_by_what_takes_longest():
    lines = time_lines(RunTime({"head": 1.0, "decoder": 3.0}, samples=8, num_steps=900), MACHINE)
    assert lines[:2] == ["time: 4.0 s a step, 2 samples/s, 1.0 h for 900 steps", "  of it: decoder 75%, head 25%"]


def test_alternatives_are_ranked_by_hours(config):
    full = changed(config, model={"trainable": ("projector", "llm")})
    found = alternatives(full, 1, estimate(full).peak + 3 * 2**29)
    assert len(found) > 1
    times = [RunTime({"decoder": float(10 - at)}, None, 360) for at in range(len(found))]
    head, *lines = alternatives_table(found, times)
    assert "hours" in head
    names = [line for line in lines if not line.startswith(" " * 10)]
    assert names[0].startswith(f"  {found[-1].change.name}")
    assert f"{times[-1].hours:.3g}" in names[0]


def test_the_command_takes_a_gpu_that_is_not_here(config, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json", exclude_none=True)))
    with pytest.raises(SystemExit) as end:
        main(["plan", str(path), "--gpu", "l40s"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "one L40S, by its data sheet" in out
    assert "samples/s" not in out  # the data does not exist
    assert "unused does not exist" in out


def test_a_machine_is_measured_once_and_again_when_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("VLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("vlm.precision._remembered", {})
    calls = []
    numbers = {"when": "today", "one_thread": 0, "products": [[1, 1, 1, 1e9]], "sweeps": [], "attention": [], "adam": 1}
    numbers |= {"image": 1, "decode": 1, "fit": 1}
    monkeypatch.setattr(measure, "_measure", lambda *_: calls.append(1) or numbers)
    cpu = torch.device("cpu")
    for again in (False, False, True):
        machine = measure.measured_machine(cpu, torch.float32, again)
    assert len(calls) == 2
    assert machine.seconds(Product(10, 10, 10)) == pytest.approx(2e-6)


# the second and the third reading are taken back
def test_processor_time_that_a_host_takes_back_makes_no_call_free(monkeypatch):
    ticks = iter([0.0, 1e-3, 0.0, 0.0, 0.0, 1e-6, *[0.0, 2e-3] * 10_000])
    monkeypatch.setattr(measure.time, "process_time", lambda: next(ticks))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    passed = iter([0.0, 0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(passed, 1.0))
    assert measure._fastest(lambda: None, torch.device("cpu"), budget=0.05) == 2e-3


# docs/plan.md has the errors of all 20; a busy machine moves both sides
@pytest.mark.thorough
@pytest.mark.slow
def test_a_small_model_takes_about_as_long_as_planned(monkeypatch, tmp_path):
    monkeypatch.setenv("VLM_CACHE_DIR", str(tmp_path))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        timed = bench_plan_time.CASES[0]
        assert sum(bench_plan_time.estimated(timed).values()) == pytest.approx(bench_plan_time.measure(timed), rel=0.4)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("all_threads", "kept"),
    [(9e10, True), (3e10, True), (2e6, False)],  # the last: threads that waited for cores that others used
)
def test_a_machine_that_others_keep_busy_is_not_remembered(all_threads, kept, capsys):
    found = {"one_thread": 5e10, "products": [[16, 16, 16, 1e6], [1024, 1024, 1024, all_threads]]}
    assert measure.is_undisturbed(found) is kept
    assert ("25000 times as long" in "".join(capsys.readouterr())) is not kept
