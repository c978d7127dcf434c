"""Evaluation tasks while a run trains: what they measure, the checkpoint that is kept by it, and when the run ends."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_runs import train_with_engines

from vlm.cli.main import app
from vlm.cli.process import run
from vlm.config import load_config
from vlm.errors import ConfigError
from vlm.export.run import export_run
from vlm.run import _best_so_far, _gates_failed_before, train
from vlm.train.checkpoint import best_step, mark_best, save_checkpoint
from vlm.train.config import LINE_NAMES
from vlm.train.engines.base import StepOutput
from vlm.train.events import Measured, RunEvents
from vlm.train.loop import StepCounts
from vlm.train.metrics import Reporter

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
    assert measured[0] == {"step": 2, "shape": 0.0, "shape.shuffled": 0.0, "shape.exact match": 0.0,
                           "failed_gates": measured[0]["failed_gates"]}  # fmt: skip
    assert len(measured[0]["failed_gates"]) == 1
    held_out = next(line for line in lines if "held_out_loss" in line)
    finetune, pretrain = (held_out[f"held_out_loss/{name}.jsonl"] for name in ("finetune", "pretrain"))
    assert min(finetune, pretrain) < held_out["held_out_loss"] < max(finetune, pretrain)
    kept = {path.name for path in (folder / "checkpoints").glob("step-*")}
    assert kept == {"step-000002", "step-000003", "step-000006"}  # two newest, and the best
    assert vlm("train", config) == 6  # the gate is not passed by that
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


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_engine_measures_what_one_process_does(config_file, tiny: Path, tmp_path: Path):
    """Of a model that has learned to name something. A pipeline measures at the save, from the checkpoint."""
    said = {
        f"{color}-{shape}-1.png": f"A {color} {shape}." for color in ("red", "blue") for shape in ("cross", "square")
    }
    asked = [
        {"image": image, "prompt": "What is this?", "choices": [*said.values()], "answer": answer}
        for image, answer in said.items()
    ]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    source = {"path": str(tmp_path / "asked.json"), "images": str(tiny / "data/images")}
    tasks: list[dict[str, Any]] = [
        {**source, "name": "writes", "kind": "generate", "metrics": ["rouge"], "max_new_tokens": 8},
        {**source, "name": "chooses", "kind": "choice"},
        {**source, "name": "expects", "kind": "loss"},
    ]
    taught: dict[str, Any] = {
        "model__lora": None, "model__trainable": ["projector", "llm"], "train__prove": False, "data__packing": False,
        "data__held_out": 0.0, "train__schedule": "constant", "train__learning_rate": 1e-2,
    }  # fmt: skip
    path = config_file(**taught, train__max_steps=16, train__micro_batch_size=8, train__global_batch_size=16)
    start = export_run(train(load_config(path), path.read_text()))
    path = config_file(
        **taught, init_from=str(start), evaluation={"tasks": tasks}, train__eval_tasks=[task["name"] for task in tasks],
        train__max_steps=2, train__eval_every=2, train__micro_batch_size=1, train__global_batch_size=4,
        engine={"timeout_seconds": 60},
    )  # fmt: skip
    alone = train(load_config(path, [f"output_dir={tmp_path / 'alone'}"]), path.read_text())
    (expected,) = (line for line in lines_of(alone) if "writes" in line)
    assert 0 < expected["writes"] < 1
    assert expected.pop("failed_gates") == []
    engines = ("ddp*2", "zero3*2", "fsdp*2", "pipeline2*2")
    for engine, folder in train_with_engines(path, engines, tmp_path / "runs").items():
        (line,) = (line for line in lines_of(folder) if "writes" in line)
        assert line.pop("failed_gates") == [], engine
        assert line == pytest.approx(expected, rel=1e-6), engine  # worst seen 2e-8


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


def test_a_measurement_that_runs_out_of_memory_waits_for_the_next_save(capsys: pytest.CaptureFixture[str]):
    written: list[dict[str, Any]] = []
    found: list[Measured | None] = [None, Measured({"shape": 0.5}, ["shape: too low"])]

    def measure(model: Any) -> Measured:
        measured = found.pop(0)
        if measured is None:
            raise torch.OutOfMemoryError
        return measured

    nothing = dict.fromkeys(("settings", "run", "writer", "skips", "questions", "assemble", "held_out"))
    engine, reporter = SimpleNamespace(whole_model=lambda: nullcontext("model")), SimpleNamespace(write=written.append)
    events = RunEvents(**nothing, state=SimpleNamespace(engine=engine), reporter=reporter, measure=measure)  # type: ignore[arg-type]
    events.evaluate(4)
    assert events._tasks_wait
    assert not written
    assert "step 4: train.eval_tasks ran out of memory" in capsys.readouterr().err
    events.evaluate(8)
    assert not events._tasks_wait
    assert written == [{"step": 8, "shape": 0.5, "failed_gates": ["shape: too low"]}]


def test_a_gate_that_was_not_passed_is_known_to_the_next_launch_as_long_as_there_is_one(config_file, tmp_path: Path):
    lines: list[dict[str, Any]] = [{"step": 2, "shape": 0.9, "failed_gates": []}, {"step": 4, "failed_gates": ["low"]}]
    for number, failed in ((1, []), (2, ["low"])):
        texts = [json.dumps(line) + "\n" for line in [*lines[:number], {"step": 5, "loss": 1.0}]]
        (tmp_path / "metrics.jsonl").write_text("".join(texts))
        for gate in (TASK["gate"], None):
            tasks = [TASK | {"path": "x.json", "gate": gate}]
            path = config_file(evaluation={"tasks": tasks}, train__eval_tasks=["shape"], train__eval_every=2)
            found = _gates_failed_before(load_config(path), SimpleNamespace(path=tmp_path))  # type: ignore[arg-type]
            assert found == (failed if gate else [])


def test_the_best_of_a_run_that_goes_on_counts_as_long_as_its_checkpoint_is_there(config_file, tmp_path: Path):
    path = config_file(train__keep_best="held_out_loss", train__eval_every=2)
    parts: Any = SimpleNamespace(config=load_config(path), data=SimpleNamespace(held_out=[]))
    run: Any = SimpleNamespace(path=tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "held_out_loss": 1.0}\n{"step": 4, "held_out_loss": 2.0}\n')
    checkpoint = tmp_path / "checkpoints/step-000002"
    checkpoint.mkdir(parents=True)
    mark_best(tmp_path, 2)
    best = _best_so_far(parts, run)
    assert best is not None
    assert (best.step, best.value, best.num_since) == (2, 1.0, 1)
    checkpoint.rmdir()
    best = _best_so_far(parts, run)
    assert best is not None
    assert (best.step, best.value, best.num_since, best.lower_is_better) == (None, None, 0, True)


def test_every_number_of_a_line_is_no_name_for_a_task():
    lines: list[dict[str, Any]] = []
    run = SimpleNamespace(path=None, append=lambda name, line: lines.append(line))
    settings = SimpleNamespace(log_every=1, learning_rate=1.0, trackers=(), tensorboard=False, trackers_online=False)
    reporter = Reporter(run, settings, lambda step: 1.0, lambda step: 0.5, start_step=0, max_steps=2)  # type: ignore[arg-type]
    reporter.record(1, StepOutput(1.0, 1.0, True, loss_scale=2.0), StepCounts(1, 1, 1, 1, 1, 0, 1), {"rollouts": 0.1})
    assert {*lines[0], "failed_gates"} == LINE_NAMES


@pytest.mark.parametrize(
    ("name", "objective", "is_taken"),
    [("loss", "lm", True), ("held_out_loss", "lm", True), ("accuracy", "lm", False), ("accuracy", "dpo", True)],
)
def test_a_task_that_is_called_as_a_number_of_the_run_is_refused(
    config_file, name: str, objective: str, is_taken: bool
):
    tasks = [TASK | {"path": "x.json", "name": name}]
    changes = {"evaluation": {"tasks": tasks}, "objective": {"kind": objective}, "train__eval_every": 2}
    load_config(config_file(**changes))  # `vlm eval` alone
    path = config_file(**changes, train__eval_tasks=[name])
    with pytest.raises(ConfigError, match=f"eval_tasks: {name} is a number of") if is_taken else nullcontext():
        load_config(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_tasks": ["shape"]}, "eval_tasks without eval_every"),
        (
            {"eval_tasks": ["form"], "eval_every": 2},
            r"eval_tasks: form is no name of evaluation\.tasks, which are \['shape'\]",
        ),
        (
            {"keep_best": "shape", "eval_every": 2},
            "keep_best shape: expected one of held_out_loss, held_out_accuracy, ",
        ),
        ({"keep_best": "held_out_margin", "eval_every": 2}, "held_out_margin is not measured with objective.kind lm"),
        (
            {"keep_best": "shape.nope", "eval_every": 2, "eval_tasks": ["shape"]},
            "keep_best shape.nope: the task has exact match, shuffled",
        ),
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


def test_a_gate_on_a_figure_that_the_task_has_not_is_refused_at_once(config_file):
    task = {"name": "said", "kind": "generate", "metrics": ["rouge", "yes_no"], "path": "x.json"}
    for figure, is_right in (("ROUGE-2", True), ("yes ratio", True), ("accuracy", True), ("BLEU-4", False)):
        path = config_file(evaluation={"tasks": [task | {"gate": {"figure": figure, "own": 0.5}}]})
        if is_right:
            load_config(path)
        else:
            with pytest.raises(ConfigError, match=r"gate.figure BLEU-4: the task has ROUGE-1, ROUGE-2, ROUGE-L, accu"):
                load_config(path)
