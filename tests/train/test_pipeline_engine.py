"""The pipeline trains as one process does: losses, gradient norms and weights, however it is cut.

The file is also the program that each rank of a launch runs.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

STEPS = 8
LORA = ("model.lora={rank: 4, alpha: 8}", "model.trainable=[projector, llm.lora]")
LORA_ONLY = ("model.lora={rank: 4, alpha: 8}", "model.trainable=[llm.lora]")
PROJECTOR = ("model.lora=null", "model.trainable=[projector]")
FULL = ("model.lora=null", "model.trainable=[projector, llm]")  # the tiny model's head is tied to its embedding
VISION = ("model.lora=null", "model.trainable=[projector, vision]", "train.learning_rates={vision: 1e-4}")
CHECKPOINTING = ("model.gradient_checkpointing=true",)
BF16 = ("train.precision=bf16",)


@dataclass(frozen=True)
class Case:
    options: tuple[str, ...]
    stages: int  # 1 is LocalEngine
    data_ranks: int = 1
    cuts: tuple[int, ...] | None = None
    start: int = 0
    stop: int = STEPS
    load: str | None = None  # checkpoint to start from
    fault: str | None = None


@dataclass
class Outcome:
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    applied: list[bool] = field(default_factory=list)
    evaluated: tuple[float, int] = (0.0, 0)
    folder: str = ""  # checkpoint after the last step


def train(config: Any, case: Case, out: Path) -> Outcome:
    """What every rank does; the folder is a checkpoint afterwards."""
    import torch

    from vlm import faults
    from vlm.data.build import build_data
    from vlm.distributed import barrier, rank

    stage, data_rank = divmod(rank(), case.data_ranks)
    engine, built = build_pipeline(config, case, stage) if case.stages > 1 else build_local(config)
    data = build_data(
        config.data, built.tokenizer, built.image_spec, built.image_token_id, seed=config.seed,
        global_batch_size=config.train.global_batch_size, micro_batch_size=config.train.micro_batch_size,
        data_rank=data_rank, num_data_ranks=case.data_ranks,
    )  # fmt: skip
    if case.load is not None:
        engine.load(Path(case.load))
    os.environ["VLM_FAULT"] = case.fault or ""
    faults._fired.clear()
    outcome = Outcome(folder=str(out))
    batches: list[Any] = []
    for step, batches in zip(range(case.start, case.stop), data.train.iterate(case.start), strict=False):
        faults.set_step(step)
        before = [p.detach().clone() for p in engine.model.parameters()]
        (weight,) = engine.sum_over_data_ranks([float(sum(map(engine.objective.weight, batches)))])
        output = engine.train_step(batches, weight, config.train.learning_rate * (step + 1) / STEPS)
        same = all(torch.equal(p, old) for p, old in zip(engine.model.parameters(), before, strict=True))
        assert output.applied or same
        outcome.losses.append(output.loss)
        outcome.grad_norms.append(output.grad_norm)
        outcome.applied.append(output.applied)
    assert engine.gather_from_data_ranks(data_rank) == list(range(case.data_ranks))
    outcome.evaluated = evaluate(engine, batches)
    out.mkdir(parents=True, exist_ok=True)
    barrier()
    engine.save(out)
    barrier()
    return outcome


def evaluate(engine: Any, batches: list[Any]) -> tuple[float, int]:
    """Loss and weight of a step's rows, and of two rows of text that are shorter than all others."""
    import torch

    from vlm.batch import Batch

    ids = torch.arange(5, 45).repeat(2, 1)
    text = Batch(ids, ids, torch.arange(40).repeat(2, 1))
    results = [engine.evaluate(batch) for batch in batches]
    summed, weight = engine.evaluate(text)
    ranks = engine.num_data_ranks  # each of which evaluated the text
    return sum(loss for loss, _ in results) + summed / ranks, sum(count for _, count in results) + weight // ranks


def build_local(config: Any) -> tuple[Any, Any]:
    import torch

    from vlm.models.build import build_model
    from vlm.objectives.lm import LanguageModeling
    from vlm.train.engines.base import LossModule
    from vlm.train.engines.local import LocalEngine
    from vlm.train.optim import build_optimizer

    built = build_model(config.model, precision=config.train.precision, seed=config.seed)
    module = LossModule(built.model, LanguageModeling(), autocast_dtype(config))
    engine = LocalEngine(
        module, build_optimizer(built.model, config.train), device=torch.device("cpu"),
        max_grad_norm=config.train.max_grad_norm,
    )  # fmt: skip
    return engine, built


def build_pipeline(config: Any, case: Case, number: int) -> tuple[Any, Any]:
    import torch

    from vlm.models.pipeline_build import build_stage
    from vlm.objectives.lm import LanguageModeling
    from vlm.plan.cuts import balanced_cuts
    from vlm.train.engines.deepspeed_settings import deepspeed_settings
    from vlm.train.engines.pipeline import PipelineEngine

    cuts = case.cuts or balanced_cuts([1.0] * 4, case.stages)  # inputs, two blocks, output
    stage = build_stage(config.model, cuts, number, precision=config.train.precision, seed=config.seed)
    settings = deepspeed_settings(
        config.engine, config.train, num_data_ranks=case.data_ranks, stage=1,
        accumulation_steps=config.train.global_batch_size // (config.train.micro_batch_size * case.data_ranks),
    )  # fmt: skip
    engine = PipelineEngine(
        stage, LanguageModeling(), config.train, settings, num_data_ranks=case.data_ranks,
        device=torch.device("cpu"), autocast_dtype=autocast_dtype(config),
    )  # fmt: skip
    return engine, stage.built


def autocast_dtype(config: Any) -> Any:
    import torch

    return None if config.train.precision == "fp32" else torch.bfloat16


def run(config: Path, cases: list[Case], folder: Path) -> list[Outcome]:
    """All cases have equally many processes; they share one launch."""
    (processes,) = {case.stages * case.data_ranks for case in cases}
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"config": str(config), "cases": [asdict(case) for case in cases]}))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, str(folder)]
    paths = [str(Path(__file__).parents[2]), *sys.path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [Outcome(**values) for values in json.loads((folder / "outcomes.json").read_text())]


def main(folder: Path) -> None:
    import torch

    from vlm.config import load_config
    from vlm.distributed import is_main, process_group

    job = json.loads((folder / "job.json").read_text())
    outcomes = []
    with process_group(torch.device("cpu"), 120.0):
        for number, values in enumerate(job["cases"]):
            case = Case(**values)
            config = load_config(job["config"], list(case.options))
            outcomes.append(asdict(train(config, case, folder / str(number))))
    if is_main():
        (folder / "outcomes.json").write_text(json.dumps(outcomes))


# worst seen: see each test; relative for losses and norms, mean absolute for a weight tensor
def assert_equal(found: Outcome, expected: Outcome, tolerance: float, weight_tolerance: float) -> None:
    from vlm.train.fragments import read_weights

    assert found.applied == expected.applied
    for mine, reference in ((found.losses, expected.losses), (found.grad_norms, expected.grad_norms)):
        finite = [(a, b) for a, b in zip(mine, reference, strict=True) if math.isfinite(b)]
        assert [a for a, _ in finite] == pytest.approx([b for _, b in finite], rel=tolerance)
    assert found.evaluated[0] == pytest.approx(expected.evaluated[0], rel=tolerance)
    assert found.evaluated[1] == expected.evaluated[1]
    mine, reference = read_weights(Path(found.folder)), read_weights(Path(expected.folder))
    assert mine.keys() == reference.keys()
    apart = {name: (mine[name] - reference[name]).abs().mean().item() for name in reference}
    assert max(apart.values()) < weight_tolerance, max(apart, key=apart.get)
    print(
        f"loss {worst(found.losses, expected.losses):.1e} norm {worst(found.grad_norms, expected.grad_norms):.1e} "
        f"weights {max(apart.values()):.1e}"
    )


def worst(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True) if math.isfinite(b))


@pytest.fixture
def config(config_file, tiny, tmp_path):
    """Pictures in some micro-batches and none in others, rows of unequal answers, clipping on, two learning rates."""
    lines = (tiny / "data/finetune.jsonl").read_text().splitlines()[:24]
    talk = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "A red circle. " * 3}]}
    mixed = [line for number, line in enumerate(lines) for line in ([line, json.dumps(talk)] if number % 3 else [line])]
    (tmp_path / "mixed.jsonl").write_text("\n".join(mixed))
    return config_file(
        data__sources=[{"path": str(tmp_path / "mixed.jsonl"), "images": str(tiny / "data/images")}],
        data__held_out=0.0,
        data__max_length=80,
        train__micro_batch_size=1,
        train__max_grad_norm=0.5,
        train__learning_rates={"projector": 1e-3},
        train__weight_decay=0.1,
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stages_train_as_one_process_does(config, tmp_path):
    options = {"lora": LORA, "full": FULL, "projector": PROJECTOR, "vision": VISION}
    expected = run(config, [Case(o, 1) for o in options.values()], tmp_path / "local")
    assert all(outcome.losses[-1] < outcome.losses[0] for outcome in expected)
    for stages, data_ranks in ((2, 1), (2, 2), (3, 1)):
        cases = [Case(o, stages, data_ranks) for o in options.values()]
        found = run(config, cases, tmp_path / f"{stages}x{data_ranks}")
        for name, mine, reference in zip(options, found, expected, strict=True):
            print(f"{stages}x{data_ranks} {name}", end=": ")
            assert_equal(mine, reference, 1e-5, 1e-5)  # worst seen: loss 1.4e-7, norm 4.6e-7, weights 3.3e-8


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_any_cut_and_precision_trains_as_one_process_does(config, tmp_path):
    """Nothing trains on the first stage; the tied head is alone on the last; hidden states travel in bf16."""
    cases = {
        "frozen inputs alone": (LORA_ONLY, (1,), 1e-5, 1e-5),
        "tied head alone": (FULL, (3,), 1e-5, 1e-5),
        "gradient checkpointing": ((*LORA, *CHECKPOINTING), (2,), 1e-5, 1e-5),
        "bf16, adapters": ((*LORA, *BF16), (2,), 1e-5, 1e-5),  # worst seen: loss 0, norm 1.1e-7, weights 5.6e-10
        "bf16, everything": ((*FULL, *BF16), (2,), 5e-4, 2e-5),  # worst seen: loss 2.1e-6, norm 4.2e-5, weights 1.4e-6
    }
    expected = run(config, [Case(options, 1) for options, *_ in cases.values()], tmp_path / "local")
    found = run(config, [Case(options, 2, 1, cuts) for options, cuts, *_ in cases.values()], tmp_path / "pipeline")
    for (name, (_, _, *tolerances)), mine, reference in zip(cases.items(), found, expected, strict=True):
        print(name, end=": ")
        assert_equal(mine, reference, *tolerances)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_loss_that_is_not_finite_changes_no_weight_on_any_rank(config, tmp_path):
    """`train` compares the weights on every rank; the steps after it are those of one process."""
    (expected,) = run(config, [Case(FULL, 1, fault="loss@3=nan")], tmp_path / "local")
    (found,) = run(config, [Case(FULL, 2, 1, fault="loss@3=nan")], tmp_path / "pipeline")
    assert found.applied == [step != 3 for step in range(STEPS)]
    assert math.isnan(found.losses[3])
    assert_equal(found, expected, 1e-5, 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_checkpoints_go_from_one_process_to_stages_and_back(config, tmp_path):
    half = STEPS // 2
    options = (LORA, FULL)
    whole = run(config, [Case(o, 1) for o in options], tmp_path / "whole")
    local = run(config, [Case(o, 1, stop=half) for o in options], tmp_path / "local")
    stages = run(config, [Case(o, 2, stop=half) for o in options], tmp_path / "stages")
    routes = {
        "local, then stages": (local, 2, 1),
        "stages, then local": (stages, 1, 1),
        "2x1, then 2x2": (stages, 2, 2),
    }
    for name, (before, num_stages, data_ranks) in routes.items():
        cases = [
            Case(o, num_stages, data_ranks, start=half, load=first.folder)
            for o, first in zip(options, before, strict=True)
        ]
        for found, full in zip(run(config, cases, tmp_path / name), whole, strict=True):
            rest = Outcome(full.losses[half:], full.grad_norms[half:], full.applied[half:], full.evaluated, full.folder)
            print(name, end=": ")
            assert_equal(found, rest, 1e-5, 1e-5)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
