"""Proofs on two processes, under every engine: nothing is refused, a leak is found, and training is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from launched import launch
from proof_setups import write_config
from proven_here import prove_here
from warm import run_warm

from vlm.train.checkpoint import newest_verified
from vlm.train.fragments import read_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "zero 1": {"kind": "zero", "stage": 1},
    "zero 3": {"kind": "zero", "stage": 3},
    "fsdp": {"kind": "fsdp"},
    "pipeline": {"kind": "pipeline", "num_stages": 2},
}
# checks that no process can make by itself, as none holds the whole model
OF_A_WHOLE_MODEL = {"gradients", "frozen_steady", "projector_scale"}
LEFT_OUT = {
    "ddp": set(),
    "zero 1": OF_A_WHOLE_MODEL | {"micro_batches"},
    "zero 3": OF_A_WHOLE_MODEL | {"micro_batches", "initial_weights"},
    "fsdp": OF_A_WHOLE_MODEL | {"initial_weights"},
    "pipeline": OF_A_WHOLE_MODEL | {"micro_batches"},
}


def config_of(root: Path, engine: str, **changes: Any) -> str:
    train = {"max_steps": 3, "global_batch_size": 4, "micro_batch_size": 1, "precision": "fp32"}
    section = {**ENGINES[engine], "device": "cpu", "timeout_seconds": 60}
    return str(write_config(root, "second stage", engine=section, **{"train": train, **changes}))


def outcomes(root: Path, folder: Path, engine: str, leak: bool) -> list[Any]:
    folder.mkdir(exist_ok=True)
    launch(prove_here, {"config": config_of(root, engine), "out": str(folder), "leak": leak})
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    return first


@pytest.mark.one_in(3)
@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_refused_and_what_cannot_be_checked_is_said(engine, root, tmp_path):
    failed, left = outcomes(root, tmp_path, engine, leak=False)
    assert failed == []
    assert set(left) == LEFT_OUT[engine]


@pytest.mark.parametrize("engine", ["zero 3", "pipeline"])
def test_a_leak_is_found_by_the_loss_where_hidden_states_cannot_be_seen(engine, root, tmp_path):
    failed, _ = outcomes(root, tmp_path, engine, leak=True)
    assert "packed_alone" in failed


@pytest.mark.thorough
@pytest.mark.parametrize("engine", ENGINES)
def test_a_proven_run_ends_equal_to_the_bit_to_one_that_is_not(engine, root, tmp_path):
    ends = []
    for prove in ("true", "false"):
        path = config_of(root, engine, output_dir=str(tmp_path / prove))
        code, output = run_warm(warm.train, path, f"--options=train.prove={prove}", nproc=2)
        assert code == 0, output[-3000:]
        ends.append(read_weights(newest_verified(tmp_path / prove)))
        assert (tmp_path / prove / "proof.json").exists() is (prove == "true")
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
