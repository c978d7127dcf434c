"""Evaluation tasks while a run trains: what they measure, the checkpoint that is kept by it, and when the run ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm.cli.main import app
from vlm.cli.process import run
from vlm.config import load_config
from vlm.errors import ConfigError
from vlm.train.checkpoint import best_step, mark_best, save_checkpoint

TASK = {
    "name": "shape",
    "kind": "generate",
    "metrics": ["exact_match"],
    "max_new_tokens": 4,
    "gate": {"over_shuffled": 0.5},
}


def vlm(*arguments: object) -> int:
    return run(lambda: app([*map(str, arguments)], standalone_mode=False))


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_measures_tasks_keeps_the_best_and_ends_early_with_its_gate(
    config_writer, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Twelve steps teach this model no answer, so the first measurement stays the best, and two later ones end it."""
    source = {"path": str(tiny / "data/finetune.jsonl"), "images": str(tiny / "data/images")}
    other = {**source, "path": str(tiny / "data/pretrain.jsonl")}
    config = config_writer(tmp_path)(
        data__sources=[source, other], evaluation={"tasks": [TASK | source]}, train__eval_tasks=["shape"],
        train__eval_records=6, train__eval_every=2, train__save_every=3, train__keep_best="shape",
        train__early_stop=2, train__prove=False,
    )  # fmt: skip
    assert vlm("train", config) == 6
    said = capsys.readouterr().err
    assert "step 6: 2 times no better than shape 0.0 of step 2" in said
    assert "done: 6 steps" in said
    assert "the model does not pass 1 gate:\n  shape, exact match: own images 0.000" in said
    folder = tmp_path / "run"
    lines = lines_of(folder)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    measured = [line for line in lines if "shape" in line]
    assert measured[0] == {"step": 2, "shape": 0.0, "shape.shuffled": 0.0, "shape.exact match": 0.0}
    held_out = next(line for line in lines if "held_out_loss" in line)
    finetune, pretrain = (held_out[f"held_out_loss/{name}.jsonl"] for name in ("finetune", "pretrain"))
    assert min(finetune, pretrain) < held_out["held_out_loss"] < max(finetune, pretrain)
    kept = {path.name for path in (folder / "checkpoints").glob("step-*")}
    assert kept == {"step-000002", "step-000003", "step-000006"}  # two newest, and the best
    assert vlm("train", config) == 0
    assert "nothing to train: the run ended after step 6" in capsys.readouterr().err
    assert vlm("export", folder, "--checkpoint", "best") == 0
    assert json.loads((folder / "export-step-2/vlm.json").read_text())["origin"]["steps"] == 2


@pytest.mark.slow
def test_measuring_changes_nothing_of_the_training(config_writer, tiny: Path, tmp_path: Path):
    source = {"path": str(tiny / "data/finetune.jsonl"), "images": str(tiny / "data/images")}
    losses = []
    for name, every in (("without", None), ("with", 1)):
        (tmp_path / name).mkdir()
        config = config_writer(tmp_path / name)(
            train__max_steps=3, train__eval_every=every, train__eval_tasks=["shape"] if every else [],
            train__prove=False, evaluation={"tasks": [{**TASK, **source, "gate": None}]}, train__eval_records=3,
        )  # fmt: skip
        assert vlm("train", config) == 0
        losses.append(
            [(line["loss"], line["grad_norm"]) for line in lines_of(tmp_path / name / "run") if "loss" in line]
        )
    assert losses[0] == losses[1]


def test_the_best_checkpoint_is_kept_whatever_comes_after(tmp_path: Path):
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, lambda folder: None, {}, keep_last=2)
        if step == 2:
            mark_best(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == [
        "step-000002", "step-000004", "step-000005",
    ]  # fmt: skip
    assert best_step(tmp_path) == 2
    mark_best(tmp_path, 7)  # of a checkpoint that could not be written
    assert best_step(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_tasks": ["shape"]}, "eval_tasks without eval_every"),
        (
            {"eval_tasks": ["form"], "eval_every": 2},
            r"eval_tasks: form is no name of evaluation\.tasks, which are \['shape'\]",
        ),
        ({"keep_best": "shape", "eval_every": 2}, "keep_best shape: expected one of held_out_loss, or TASK"),
        ({"keep_best": "held_out_loss"}, "keep_best without eval_every"),
        ({"early_stop": 2, "eval_every": 2}, "early_stop without keep_best"),
    ],
)
def test_settings_that_say_nothing_are_refused(config_file, changes: dict[str, Any], message: str):
    path = config_file(
        evaluation={"tasks": [TASK | {"path": "x.json"}]},
        **{f"train__{name}": value for name, value in changes.items()},
    )
    with pytest.raises(ConfigError, match=message):
        load_config(path)
