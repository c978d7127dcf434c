"""scripts/bench_train.py and scripts/bench_levers.py at the smallest size."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import bench_levers
import bench_train
import pytest
from bench_levers import LEVERS, Lever
from bench_peers.meter import Result, Task
from bench_peers.parts import JOBS, SHAPES, needed_flops, settings_of, write_llava
from bench_train import Bench, Row, interleave, rows_of

from vlm.config import RunConfig


def result(**changes) -> Result:
    """4 records of 100 tokens in 500 slots, 2 CPU seconds."""
    values = {
        "records": 4, "tokens": 400.0, "supervised": 200.0, "slots": 500.0, "cpu_seconds": 2.0, "wall_seconds": 4.0,
        "peak_bytes": 3_000_000_000, "matmul_flops": 1e9, "first_loss": 7.0, "phases": {"data": 1.0},
    }  # fmt: skip
    return Result(**values | changes)


@pytest.fixture(scope="module")
def tiny_parts(tmp_path_factory) -> list[str]:
    """Arguments of both scripts for the smallest run."""
    folder = tmp_path_factory.mktemp("bench")
    return ["--shape", "tiny", "--folder", str(folder), "--samples", "2", "--batch", "2", "--threads", "1"]


def test_a_row_is_per_record_of_the_mean_length_whatever_a_system_drew():
    task = Task(*("J2", "", "", [], None, "cpu", "fp32", 1, 8, 100, 8, 1, False))
    tasks = dict.fromkeys(("short", "long"), ("ours", task))
    measured = {"short": [result(), result(cpu_seconds=4.0)], "long": [result(tokens=1200.0, cpu_seconds=6.0)]}
    rows = rows_of(Bench("tiny"), tasks, measured)
    assert rows["short"].tokens == rows["long"].tokens == 2000 / 12
    assert rows["long"].cpu_seconds == pytest.approx(6 / 1200 * 2000 / 12)
    assert rows["short"].cpu_seconds == pytest.approx(3 / 400 * 2000 / 12)  # the median of two rounds
    assert rows["short"].fill == 0.8
    assert rows["short"].phases == {"data": 0.25}
    assert rows["short"].spread == pytest.approx(2 / 3)  # 2 and 4 seconds


def test_utilisation_is_what_a_record_needs_of_what_the_machine_can():
    shape, job = SHAPES["tiny"], JOBS["J2"]
    flops = needed_flops(job, shape, tokens=100, supervised=50, encodes=True)
    row = Row.of([result()], job, shape, 100.0, is_on_gpu=False, encodes=True)
    assert row.utilisation == pytest.approx(flops / 0.5 / 1e9)  # half a CPU second a record
    frozen = needed_flops(JOBS["J1"], shape, tokens=100, supervised=50, encodes=True)
    encoder = flops - needed_flops(job, shape, tokens=100, supervised=50, encodes=False)
    attention = 3 * 2 * 2 * 64 * 100**2
    assert (flops - encoder - attention) / (frozen - encoder - attention) == pytest.approx(3 / 2)


def test_peers_take_turns():
    order = []

    class Measured(Bench):
        def measure(self, system, task):
            order.append(system)
            return result()

    task = Task(*("J2", "", "", [], None, "cpu", "fp32", 1, 8, 100, 8, 1, False))
    interleave(Measured(), {"ours": ("ours", task), "trainer": ("trainer", task)}, rounds=2)
    assert order == ["ours", "trainer", "ours", "trainer"]


@pytest.mark.parametrize(
    ("options", "rows", "micro_batch"),
    [([], 2, 1), (["data.max_length=1024"], 3, 1), (["data.packing=false"], 8, 8)],
)
def test_a_step_holds_about_as_many_records_however_rows_are_cut(options, rows, micro_batch, tmp_path):
    settings = settings_of(
        JOBS["J2"], SHAPES["toy"], tmp_path, precision="fp32", device="cpu", batch=8, options=options
    )  # 446 tokens a record
    assert settings["train"]["global_batch_size"] == rows
    assert settings["train"]["micro_batch_size"] == micro_batch


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_job_and_shape_is_a_config(name, shape, tmp_path):
    settings = settings_of(JOBS[name], SHAPES[shape], tmp_path, precision="bf16", device="cuda", batch=4, options=[])
    assert RunConfig.model_validate(settings).model.trainable == JOBS[name].trainable


def test_a_peer_that_cannot_be_imported_is_skipped_by_name(capsys, monkeypatch):
    monkeypatch.setattr(bench_train, "bench_job", lambda bench, job, systems, *rest: systems == ["ours", "trainer"])
    monkeypatch.setitem(bench_train.SYSTEMS, "trl", ("trl_sft.py", "no_such_package", ("J2",)))
    assert bench_train.main(["--against", "trl,trainer", "--jobs", "J2"]) == 0
    assert f"trl is skipped: {sys.executable} cannot import it" in capsys.readouterr().out


@pytest.fixture
def in_this_process(monkeypatch):
    """Measurements without a process of their own, which takes seconds to start."""

    def measure(self, system, task):
        if not Path(task.llava).exists():
            write_llava(Path(task.llava), Path(self.task(JOBS["J2"]).config))
        return importlib.import_module(f"bench_peers.{system}").measure(task)

    monkeypatch.setattr(Bench, "measure", measure)


@pytest.mark.slow
def test_a_job_of_ours_alone_is_a_row_with_every_phase(in_this_process, tiny_parts, capsys):
    for _ in range(3):  # of a tiny encoder's share, half a percent is rounded to none where other work disturbs a run
        assert bench_train.main([*tiny_parts, "--jobs", "J2-lora", "--against", ""]) == 0
        cells = [cell.strip() for cell in capsys.readouterr().out.strip().splitlines()[-1].split("|")]
        assert cells[1] == "ours"
        shares = [int(cell.removesuffix("%")) for cell in cells[7:11]]  # data, encode, fwd+bwd, optimizer
        assert 90 <= sum(shares) <= 102
        if min(shares[1:3]) > 0:
            return
    pytest.fail(f"encode, fwd+bwd: {shares[1:3]} %")


@pytest.mark.slow
@pytest.mark.parametrize("job", ["J1", "J2-lora"])
def test_ours_and_transformers_trainer_compute_the_same_loss_of_the_same_records(
    in_this_process, tiny_parts, job, capsys
):
    assert bench_train.main([*tiny_parts, "--jobs", job]) == 0  # 1 if the losses differ by more than 1e-5
    out = capsys.readouterr().out
    assert "| trainer | " in out
    assert "trainer / ours: CPU time " in out


@pytest.mark.slow
def test_a_lever_is_a_line(in_this_process, tiny_parts, monkeypatch, capsys):
    lever = Lever("packing", "J1", ("data.packing=false",), ("data.packing=true", "data.max_length=128"))
    monkeypatch.setattr(bench_levers, "LEVERS", (lever,))
    assert bench_levers.main(tiny_parts) == 0
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].split("|")]
    assert cells[1:3] == ["packing", "J1"]
    assert float(cells[5]) > 0
    assert float(cells[9]) < 1e-5  # relative difference of the losses; worst seen 2e-7


@pytest.mark.thorough
@pytest.mark.slow
def test_every_measurement_is_a_process_of_its_own(tiny_parts, capsys):
    assert bench_train.main([*tiny_parts, "--jobs", "J1"]) == 0
    assert "trainer / ours: CPU time " in capsys.readouterr().out


def test_the_levers_are_of_keys_that_exist(tmp_path):
    from vlm.config import load_config

    for lever in LEVERS:
        for options in (lever.off, lever.on):
            path = tmp_path / "config.yaml"
            settings = settings_of(
                JOBS[lever.job], SHAPES["tiny"], tmp_path, precision="fp32", device="cpu", batch=4, options=options
            )
            path.write_text(json.dumps(settings))
            load_config(str(path), list(options))
