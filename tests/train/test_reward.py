"""Reward models: the loss in numbers, what of the model trains, and a run from its first step to the scores of its
export."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from prove_engines import Case, run_cases, worst_differences
from tiny_export import write_llm
from toy_runs import start_warm, stop_and_go_on

import vlm
from vlm.batch import IGNORE_INDEX, Example
from vlm.config import load_config
from vlm.data.collate import Collator
from vlm.errors import CheckpointError, ConfigError, RecordError
from vlm.evaluation.scores import read_scored, score_file
from vlm.export.run import export_run
from vlm.inference.reward import load_reward_model
from vlm.models.build import build_model
from vlm.models.config import ModelConfig
from vlm.objectives.base import Head
from vlm.objectives.reward import RewardConfig, reward_replies
from vlm.plan.estimate import estimate
from vlm.run import train
from vlm.train.checkpoint import best_step

X = IGNORE_INDEX


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, math.log(1 + math.exp(-2)) + math.log(1 + math.exp(0.5))),
        ({"margin": 1.0}, math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1.5))),
        ({"center": 0.1}, math.log(1 + math.exp(-2)) + math.log(1 + math.exp(0.5)) + 0.1 * (4**2 + 0.5**2)),
    ],
)
def test_the_loss_is_that_of_bradley_and_terry(settings: dict[str, float], expected: float):
    output = RewardConfig(**settings).build().of_rewards(torch.tensor([3.0, 1.0, 0.0, 0.5]))
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)
    assert {name: float(value) for name, value in output.metrics.items()} == {
        "rewards_chosen": 3.0, "rewards_rejected": 1.5, "margin": 1.5, "accuracy": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("shares", [True, False])
def test_a_reply_is_scored_at_its_last_learned_token(shares: bool):
    """7 is what a template writes after a reply; nothing of it is learned."""
    one, other = (Example([1, 2, *reply, 7], [X, X, *reply, X]) for reply in ([3, 4], [5]))
    pair = Example(one.input_ids, one.labels, rejected=other)
    batch = Collator(None, 0, 1, pad_to=12, shares_questions=shares)([[pair]])
    states = batch.input_ids[..., None].float()
    objective = RewardConfig().build()
    head = Head(lambda states: states, values=lambda states: 10 * states[:, 0])
    assert reward_replies(states, batch, head).tolist() == [40, 50]
    read = objective.reads(batch)
    assert read is not None
    assert batch.input_ids[read].tolist() == [4, 5]


def test_of_no_replies_the_loss_is_0_with_a_graph_through_the_head():
    batch = Collator(None, 0, 1, pad_to=8)([[]])
    weight = torch.ones(3, requires_grad=True)
    objective = RewardConfig().build()
    output = objective.loss(torch.zeros(1, 8, 3), batch, Head(lambda s: s, values=lambda states: states @ weight))
    output.loss.backward()
    assert (output.loss.item(), objective.normalizer(batch)) == (0.0, 0)
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize(
    ("objective", "trainable", "message"),
    [
        ("reward", ["llm.lora"], "objective.kind reward trains a value head: add value_head to model.trainable"),
        ("dpo", ["llm.lora", "value_head"], "names value_head, which objective.kind dpo does not train"),
    ],
)
def test_objective_and_value_head_belong_together(config_file, objective: str, trainable: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(config_file(objective={"kind": objective}, model__trainable=trainable))


def test_samples_of_a_model_that_writes_nothing_are_refused(config_file):
    asked = [{"prompt": "What is this?"}]
    path = config_file(objective={"kind": "reward"}, model__trainable=["value_head"], train__samples=asked)
    with pytest.raises(ConfigError, match=r"set train\.samples and train\.eval_tasks to \[\]"):
        load_config(path)


@pytest.mark.parametrize(("kind", "tied"), [("reward", True), ("reward", False), ("ppo", False)])
def test_all_trains_but_an_output_layer_that_nothing_reads_and_the_plan_counts_so(
    config_file, tmp_path: Path, kind: str, tied: bool
):
    llm = {"path": str(write_llm(tmp_path / "llm", tied=tied))}
    objective = {"kind": kind, **({"rewards": [{"kind": "exact"}]} if kind == "ppo" else {})}
    config = load_config(config_file(objective=objective, model={"llm": llm, "trainable": ["llm", "value_head"]}))
    scores = config.objective.scores
    one, same, other = (build_model(config.model, seed=seed, scores=scores).model for seed in (3, 3, 4))
    frozen = ["llm.lm_head.weight"] if kind == "reward" and not tied else []
    assert [n for n, p in one.named_parameters() if not p.requires_grad] == frozen
    assert sum(p.numel() for p in one.parameters() if p.requires_grad) == estimate(config).num_trained
    assert sum(p.numel() for p in one.parameters()) == estimate(config).num_parameters
    first, second, third = (model.get_parameter("value_head.weight") for model in (one, same, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_a_saved_output_layer_is_refused_where_nothing_reads_it(tmp_path: Path):
    lora, llm = {"rank": 2, "alpha": 4, "modules_to_save": ["lm_head"]}, write_llm(tmp_path / "llm", tied=False)
    model = ModelConfig(vision=None, llm={"path": str(llm)}, lora=lora, trainable=("llm.lora", "value_head"))
    with pytest.raises(ConfigError, match="modules_to_save names the output layer, which nothing reads"):
        build_model(model, scores=True)
    head = build_model(model).model.llm.get_output_embeddings()  # of ppo
    assert any(parameter.requires_grad for parameter in head.parameters())


@pytest.fixture
def pairs(config_file, tiny: Path, tmp_path: Path):
    """Writes a config whose records prefer the reply that names a color."""
    colors, shapes = ("red", "green", "blue"), ("circle", "square", "cross")
    images = sorted(path.name for path in (tiny / "data/images").iterdir())
    records = [
        {"image": images[n % len(images)], "prompt": "What is this?", "chosen": f"A {color} {shape}.",
         "rejected": f"A {shape}."}
        for n, (color, shape) in enumerate((color, shape) for color in colors for shape in shapes)
    ]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records * 2))

    def write(**changes: Any) -> Path:
        source = {"path": str(tmp_path / "pairs.jsonl"), "images": str(tiny / "data/images")}
        settings = {"data__held_out": 0.25, "data__max_length": 192, "train__micro_batch_size": 1} | changes
        trainable = ["projector", "llm.lora", "value_head"]
        settings = {"objective": {"kind": "reward"}, "model__trainable": trainable} | settings
        return config_file(data__sources=[source], **settings)

    return write


def lines_of(run: Path, key: str = "loss") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_reward_model_learns_goes_on_to_the_bit_and_its_export_says_the_same(pairs, tiny: Path, tmp_path: Path):
    path = pairs(
        train__max_steps=16, train__save_every=8, train__eval_every=8, train__keep_best="held_out_margin",
        train__learning_rate=1e-2,
    )  # fmt: skip
    whole = train(load_config(path), path.read_text())
    first, held_out = lines_of(whole, "held_out_loss")
    assert held_out["held_out_accuracy"] == 1.0
    assert held_out["held_out_margin"] > first["held_out_margin"]
    assert best_step(whole) == 16
    assert held_out["held_out_margin"] == pytest.approx(
        held_out["held_out_rewards_chosen"] - held_out["held_out_rewards_rejected"], abs=1e-5
    )
    proof = {check["name"]: check["passed"] for check in json.loads((whole / "proof.json").read_text())["checks"]}
    assert {proof[name] for name in ("loss", "gradients", "micro_batches", "shared_image", "trainable")} == {True}

    again = stop_and_go_on(path, tmp_path / "other")
    names = ("loss", "grad_norm", "margin")
    assert [[line[name] for name in names] for line in lines_of(again)] == [
        [line[name] for name in names] for line in lines_of(whole)
    ]

    export = export_run(whole)
    assert (export / "value_head.safetensors").is_file()
    with pytest.raises(CheckpointError, match="is a reward model: it scores replies and writes none"):
        vlm.load(export)
    images = tiny / "data/images"
    file = score_file(tmp_path / "pairs.jsonl", images, 6, export, tmp_path / "scores", tmp_path, "cpu")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    scores = [line[f"score_{key}"] for line in lines for key in ("chosen", "rejected")]
    assert all(good > bad for good, bad in zip(scores[0::2], scores[1::2], strict=True))
    full = load_reward_model(export_run(whole, full=True), "cpu", "fp32")
    records = read_scored(tmp_path / "pairs.jsonl", images, 6, tmp_path)
    replies = [reply for record in records for reply in record.replies]
    assert full(replies, max_tokens=1) == pytest.approx(scores, abs=1e-4)  # one by one

    goes_on = pairs(init_from=str(export), output_dir=str(tmp_path / "more"), train__max_steps=1)
    first = lines_of(train(load_config(goes_on), goes_on.read_text()))[0]
    assert first["accuracy"] == 1.0
    assert first["margin"] > 1  # a fresh head begins at about 0


@pytest.mark.thorough
@pytest.mark.slow
def test_adapters_of_a_quantized_base_learn_to_score(pairs, tiny: Path):
    llm = {"path": str(tiny / "llm"), "quantization": {"format": "nf4"}}
    path = pairs(
        model__llm=llm, model__lora={"rank": 4, "alpha": 8}, train__max_steps=12, train__eval_every=12,
        train__learning_rate=1e-2,
    )  # fmt: skip
    run = train(load_config(path), path.read_text())
    said = lines_of(run)
    assert said[-1]["margin"] > said[0]["margin"]
    (held_out,) = lines_of(run, "held_out_loss")
    assert held_out["held_out_accuracy"] == 1.0
    scores = score_file(
        path.parent / "pairs.jsonl", tiny / "data/images", 6, export_run(run), run / "scores", run, "cpu"
    )
    lines = [json.loads(line) for line in scores.read_text().splitlines()]
    assert all(line["score_chosen"] > line["score_rejected"] for line in lines)


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_engines_agree_on_a_reward_model(pairs, tmp_path: Path):
    """Worst seen: loss 2.4e-6, norm 4.7e-6, weights 7.7e-8, of the language model whole, whose loss falls fast; with
    adapters less than the bounds of dpo's test."""

    path = pairs(model__lora={"rank": 4, "alpha": 8}, engine={"timeout_seconds": 60})
    whole = ("model.lora=null", "model.trainable=[projector, llm, value_head]")  # its embedding is its output layer
    adapters, others = ("local", "zero3*2", "fsdp*2", "pipeline2*2"), ("local", "pipeline2*2")
    groups = [[Case(e, ("train.precision=fp32", *o)) for e in es] for es, o in ((adapters, ()), (others, whole))]
    outcomes = run_cases(str(path), [case for group in groups for case in group], 4, tmp_path, start_warm)
    for group in groups:
        reference = outcomes[group[0]]
        for case in group[1:]:
            found = worst_differences(reference, outcomes[case])
            assert all(value <= bound for value, bound in zip(found, (1e-5, 5e-5, 5e-6), strict=True)), (case, found)
            assert outcomes[case].metrics[-1] == pytest.approx(reference.metrics[-1], rel=1e-4, abs=1e-6), case


def test_a_file_of_which_only_some_records_have_a_label_says_so(tmp_path: Path):
    record = {"instruction": "What?", "output": "A square."}
    (tmp_path / "some.jsonl").write_text(f"{json.dumps(record | {'label': True})}\n{json.dumps(record)}\n")
    with pytest.raises(RecordError, match=r"some\.jsonl: line 2: no label, and the first record has one"):
        read_scored(tmp_path / "some.jsonl", None, None, tmp_path / "cache")
