"""Whole runs on two processes: killed, stopped, spoiled, hung, and resumed by another engine.

Their processes are warm ones, since one of its own takes 10 seconds to begin, but in the test of SIGTERM to one rank.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import warm
from launched import kill_tree, run_launcher
from toy_runs import kill, overrides
from warm import run_warm
from warm_rank import warm_ranks

from vlm.cli.launch import Launch
from vlm.cli.launch import launch as launch_ranks
from vlm.train.checkpoint import list_checkpoints, newest_verified
from vlm.train.fragments import read_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def run(path, *options, nproc=2, fault="", check=0):
    """`vlm train` on every process of a launch; returns what they printed."""
    code, output = run_warm(warm.train, str(path), *overrides(options), nproc=nproc, VLM_FAULT=fault)
    assert code == check, output[-3000:]
    return output


def launch(path, *options, fault, check, extra=(), **environment):
    """`vlm train --nproc=2`, where torchrun sees what becomes of the processes; returns what was printed."""
    command = [sys.executable, "-m", "vlm.cli.main", "train", str(path), "--nproc=2", *extra, *overrides(options)]
    done = run_launcher(command, {**os.environ, "VLM_FAULT": fault, **environment})
    assert done.returncode == check, done.stderr[-3000:]
    return done.stderr


def weights(folder):
    return read_weights(newest_verified(folder))


def steps_logged(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def losses(folder):
    return {line["step"]: line["loss"] for line in steps_logged(folder)}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def path(config_file):
    """Unproven: tests/proof/test_proof_engines.py proves the engines."""
    engine = {"kind": "ddp", "timeout_seconds": 60}
    return config_file(train__micro_batch_size=1, train__prove=False, engine=engine)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("engine", [("zero", "stage=3"), ("fsdp",), ("pipeline", "num_stages=2")], ids="".join)
def test_a_killed_rank_ends_the_launch_and_the_rerun_ends_equal_to_the_bit(path, tmp_path, engine):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    kind = (f"engine.kind={engine[0]}", *(f"engine.{option}" for option in engine[1:]))
    asked = ('train.samples=[{prompt: "What is this?"}]', "train.sample_every=6", "train.max_new_tokens=6")
    kind += (*asked, "train.eval_every=4", "train.max_steps=7", "train.save_every=3")
    run(path, *kind, f"output_dir={straight}")
    last = steps_logged(straight)[-1]
    assert min(last[f"{phase}_seconds"] for phase in ("data", "encode", "forward_backward", "optimizer")) > 0
    saved = (*kind, "train.async_save=false")  # else the kill may come before the checkpoint of step 3 is written
    kill(path, *saved, f"output_dir={broken}", fault="step@5/1")  # torchrun's part is the same with all engines
    assert [info.step for info in list_checkpoints(broken)] == [3]
    run(path, *kind, f"output_dir={broken}")
    assert equal(weights(straight), weights(broken))
    assert losses(straight) == losses(broken)
    samples = [(folder / "samples.jsonl").read_text() for folder in (straight, broken)]
    assert samples[0] == samples[1]
    assert [json.loads(line)["step"] for line in samples[0].splitlines()] == [6]


@pytest.mark.thorough
@pytest.mark.parametrize("point", ["save:shard@10/1", "save:rename@10/0"])
def test_a_kill_inside_a_save_leaves_a_checkpoint_that_resumes(path, tmp_path, point):
    """What rank 0 does alone after that is tested with one process, in test_runs.py."""
    kill(path, "engine.kind=zero", "engine.stage=2", fault=point)
    folder = tmp_path / "run"
    assert [info.step for info in list_checkpoints(folder) if not info.problems] == [5]
    errors = run(path, "engine.kind=zero", "engine.stage=2")
    assert "resuming after step 5" in errors
    assert not list((folder / "checkpoints").glob(".tmp-*"))


@pytest.mark.thorough
def test_sigterm_to_one_rank_saves_once_and_every_rank_ends_with_143(path, tmp_path):
    errors = launch(path, fault="step@7/1=term", check=143, extra=("--max-restarts=1",))  # which changes nothing
    assert errors.count("stopped after step 7 and saved") == 1
    assert [info.step for info in list_checkpoints(tmp_path / "run")] == [5, 7]
    assert "Traceback" not in errors


def test_a_nan_on_one_rank_stops_all_before_the_update_and_names_the_records(path, tmp_path):
    for engine in ("ddp", "zero"):
        folder = tmp_path / engine
        kind = (f"engine.kind={engine}", "engine.stage=2", f"output_dir={folder}")
        errors = run(path, *kind, "train.save_every=6", fault="loss@7/1=nan", check=4)
        assert "step 7: loss nan" in errors or "step 7: loss inf" in errors
        assert "finetune.jsonl: line" in errors
        assert [info.step for info in list_checkpoints(folder)] == [6]


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_in_one_process_that_no_launcher_started(path, monkeypatch, stage):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    run(path, f"engine={{kind: zero, stage: {stage}}}", "train.max_steps=1", "train.prove=false", nproc=1)


def test_a_bad_step_that_is_allowed_changes_no_weight_under_zero(path, tmp_path):
    options = ("engine.kind=zero", "train.max_bad_steps=1", "train.save_every=11")
    run(path, *options, fault="loss@12/1=nan")
    before, after = (read_weights(tmp_path / f"run/checkpoints/step-0000{step}") for step in (11, 12))
    assert equal(before, after)


def test_a_rank_that_hangs_is_named_within_the_timeout(path):
    options = overrides(["engine.timeout_seconds=10"])
    with warm.started(warm.train, str(path), *options, nproc=2, VLM_FAULT="step@3/1=sleep") as ranks:  # for an hour
        ranks.processes[0].join(100)
        assert ranks.codes[0] == 1, ranks.output[-3000:]
        assert "rank 0 waited for another rank, which did not come" in ranks.output
        assert "rank 1: step 3: reading data" in ranks.output


def end_as(script, folder):
    """`vlm train --nproc=2` of which each rank is a shell script, as `work`."""
    rank = folder / "rank"
    rank.write_text(f"#!/bin/sh\n{script}\n")
    rank.chmod(0o755)
    os.environ["PYTHON_EXEC"] = str(rank)  # which torchrun starts
    sys.exit(launch_ranks(Launch(2), ["train"]))


@pytest.mark.parametrize(("script", "code"), [("[ $RANK = 0 ] && exec sleep 60; kill -9 $$", 137), ("exit 4", 4)])
def test_a_launch_ends_with_the_code_of_the_rank_that_failed(script, code, tmp_path):
    began = time.monotonic()
    assert run_warm(end_as, script, tmp_path)[0] == code
    assert time.monotonic() - began < 50  # a rank that waits is ended


@pytest.mark.thorough
def test_torchrun_restarts_a_lost_rank_and_the_run_completes(path, tmp_path):
    straight = tmp_path / "straight"
    run(path, f"output_dir={straight}")
    errors = launch(path, fault="step@8/1=kill", check=0, extra=("--max-restarts=3",), **warm_ranks(tmp_path))
    assert "resuming after step 5" in errors
    assert equal(weights(straight), weights(tmp_path / "run"))


def test_any_engine_goes_on_from_any_other(path, tmp_path):
    """Two steps with each, beside twelve of one process. Dropout is off, as its random numbers belong to a rank."""
    straight, changed = tmp_path / "straight", tmp_path / "changed"
    engines = [
        ("local", 1), ("zero", 2, "stage=3"), ("fsdp", 2), ("zero", 2, "stage=1"), ("pipeline", 2, "num_stages=2"),
        ("zero", 1, "stage=3"),
    ]  # fmt: skip

    def train(where, steps, kind, nproc, *options):
        options = (f"engine.kind={kind}", *(f"engine.{option}" for option in options), f"train.max_steps={steps}")
        common = (f"output_dir={where}", "model.lora.dropout=0", "train.schedule=constant")
        run(path, *options, *common, nproc=nproc)

    train(straight, 12, "local", 1)
    for number, engine in enumerate(engines, 1):
        train(changed, 2 * number, *engine)
    assert losses(changed) == pytest.approx(losses(straight), rel=1e-6)  # worst seen 2e-7
    for name, tensor in weights(straight).items():
        assert (tensor - weights(changed)[name]).abs().mean() < 1e-6, name


def test_sigterm_to_the_launcher_saves_and_ends_with_143(path, tmp_path):
    command = [sys.executable, "-m", "vlm.cli.main", "train", str(path), "--nproc=2"]
    command += overrides(["train.max_steps=100000", "train.save_every=100000"])
    environment = {**os.environ, **warm_ranks(tmp_path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as launcher:
        try:
            deadline = time.monotonic() + 120
            while not (tmp_path / "run/metrics.jsonl").exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            launcher.send_signal(signal.SIGTERM)
            _, errors = launcher.communicate(timeout=120)
        finally:
            kill_tree(launcher.pid)
    assert launcher.returncode == 143, errors[-2000:]
    assert len(list_checkpoints(tmp_path / "run")) == 1
