"""The pipeline trains as one process does: losses, gradient norms and weights, however it is cut."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from warm import run_warm

STEPS = 8
LORA = ("model.lora={rank: 4, alpha: 8}", "model.trainable=[projector, llm.lora]")
LORA_ONLY = ("model.lora={rank: 4, alpha: 8}", "model.trainable=[llm.lora]")
FULL = ("model.lora=null", "model.trainable=[projector, llm]")  # the tiny model's head is tied to its embedding
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
        (weight,) = engine.sum_over_data_ranks([float(sum(map(engine.objective.normalizer, batches)))])
        output = engine.train_step(batches, weight, (step + 1) / STEPS)
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
        config.train, None, num_data_ranks=case.data_ranks, stage=1, offload=(),
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
    code, output = run_warm(work, folder, nproc=processes)
    assert code == 0, output[-6000:]
    return [Outcome(**values) for values in json.loads((folder / "outcomes.json").read_text())]


def work(folder: Path) -> None:
    """What each process of a launch does."""
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
    """Images in some micro-batches and none in others, rows of unequal answers, clipping on, two learning rates."""
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


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_any_cut_and_precision_trains_as_one_process_does(config, tmp_path):
    """Other numbers of stages and ranks, with the cuts that the plan makes, are in test_engines_agree.py."""
    cases = {
        "nothing trains on the first stage": (Case(LORA_ONLY, 2, cuts=(1,)), 1e-5, 1e-5),
        "tied head alone": (Case(FULL, 2, cuts=(3,)), 1e-5, 1e-5),
        "gradient checkpointing": (Case((*LORA, *CHECKPOINTING), 2, cuts=(2,)), 1e-5, 1e-5),
        # hidden states travel in bf16; worst seen: loss 2.1e-6, norm 4.2e-5, weights 1.4e-6
        "bf16, everything": (Case((*FULL, *BF16), 2, cuts=(2,)), 5e-4, 2e-5),
        "a loss that is not finite": (Case(FULL, 2, fault="loss@3=nan"), 1e-5, 1e-5),
    }
    alone = [replace(case, stages=1, cuts=None) for case, *_ in cases.values()]
    expected = run(config, alone, tmp_path / "local")
    found = run(config, [case for case, *_ in cases.values()], tmp_path / "pipeline")
    for (name, (_, *tolerances)), mine, reference in zip(cases.items(), found, expected, strict=True):
        print(name, end=": ")
        assert_equal(mine, reference, *tolerances)
    assert found[-1].applied == [step != 3 for step in range(STEPS)]  # `train` saw no weight change on any rank
    assert math.isnan(found[-1].losses[3])


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_tied_head_goes_from_one_process_to_stages_and_back(config, tmp_path):
    half = STEPS // 2
    whole, local = run(config, [Case(FULL, 1), Case(FULL, 1, stop=half)], tmp_path / "whole")
    (stages,) = run(config, [Case(FULL, 2, stop=half)], tmp_path / "stages")
    rest = Outcome(whole.losses[half:], whole.grad_norms[half:], whole.applied[half:], whole.evaluated, whole.folder)
    for before, num_stages in ((local, 2), (stages, 1)):
        case = Case(FULL, num_stages, start=half, load=before.folder)
        (found,) = run(config, [case], tmp_path / f"onto-{num_stages}")
        assert_equal(found, rest, 1e-5, 1e-5)
