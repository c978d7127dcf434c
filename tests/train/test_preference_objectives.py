"""Objectives of compared and judged replies: the formulas of their papers, and runs that begin and go on with them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from prove_engines import Case, run_cases, worst_differences
from torch import Tensor
from toy_runs import kill, start_warm, stop_and_go_on, train_with_engines

from vlm.batch import IGNORE_INDEX, Example
from vlm.blame import blame_step
from vlm.config import load_config
from vlm.data.collate import Collator
from vlm.errors import CheckpointError, ConfigError
from vlm.objectives import OBJECTIVES
from vlm.objectives.base import Head
from vlm.objectives.replies import Scores, score_replies
from vlm.plan.records import Records, read_some
from vlm.run import train
from vlm.train.checkpoint import newest_verified
from vlm.train.fragments import read_weights
from vlm.train.reference import REFERENCE, _digest, _read, _write

X = IGNORE_INDEX
SAID = [-3.0, -4.0, -1.0, -2.5]  # log-probabilities of chosen, rejected, chosen, rejected
BEFORE = [-3.5, -3.0, -1.5, -2.0]  # of the reference
TOKENS = [2, 4, 1, 5]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def odds(mean: float) -> float:
    return math.log(math.exp(mean) / (1 - math.exp(mean)))


def pairs_of(values: list[float]) -> list[tuple[float, float]]:
    return list(zip(values[0::2], values[1::2], strict=True))


GAINS = [said - before for said, before in zip(SAID, BEFORE, strict=True)]
MEANS = [said / count for said, count in zip(SAID, TOKENS, strict=True)]
MEAN_GAINS = [gain / count for gain, count in zip(GAINS, TOKENS, strict=True)]
GOOD = [True, False, True, False]
FORMULAS = {  # section -> loss, written out from the papers, and the reward of each reply
    "dpo": (
        {"beta": 0.3},
        sum(-math.log(sigmoid(0.3 * (w - b))) for w, b in pairs_of(GAINS)),
        [0.3 * g for g in GAINS],
    ),
    "dpo smoothed": (
        {"beta": 0.3, "label_smoothing": 0.1},
        sum(
            -0.9 * math.log(sigmoid(0.3 * (w - b))) - 0.1 * math.log(sigmoid(-0.3 * (w - b)))
            for w, b in pairs_of(GAINS)
        ),
        [0.3 * g for g in GAINS],
    ),
    "dpo ipo": (
        {"loss": "ipo", "beta": 0.3},
        sum((w - b - 1 / (2 * 0.3)) ** 2 for w, b in pairs_of(MEAN_GAINS)),
        [0.3 * g for g in MEAN_GAINS],
    ),
    "dpo hinge": (
        {"loss": "hinge", "beta": 0.3},
        sum(max(0.0, 1 - 0.3 * (w - b)) for w, b in pairs_of(GAINS)),
        [0.3 * g for g in GAINS],
    ),
    "orpo": (
        {"beta": 0.3},
        sum(-w - 0.3 * math.log(sigmoid(odds(w) - odds(b))) for w, b in pairs_of(MEANS)),
        [0.3 * m for m in MEANS],
    ),
    "simpo": (
        {"beta": 2.0, "gamma": 0.5},
        sum(-math.log(sigmoid(2 * w - 2 * b - 0.5)) for w, b in pairs_of(MEANS)),
        [2 * m for m in MEANS],
    ),
    "kto": (
        {"beta": 0.3, "good_weight": 2.0},
        sum(
            2 * (1 - sigmoid(0.3 * gain)) if is_good else 1 - sigmoid(-0.3 * gain)
            for gain, is_good in zip(GAINS, GOOD, strict=True)
        ),
        [0.3 * g for g in GAINS],
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_loss_is_the_formula_of_its_paper(name: str):
    settings, expected, rewards = FORMULAS[name]
    objective: Any = OBJECTIVES[name.split()[0]](**settings).build()
    said = torch.tensor(SAID, requires_grad=True)
    output = objective.of_scores(Scores(said, torch.tensor(TOKENS).float(), torch.tensor(GOOD), torch.tensor(BEFORE)))
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    output.loss.backward()
    assert said.grad is not None
    assert (said.grad[0::2] < 0).all()  # the preferred one shall become likelier
    assert (said.grad[1::2] >= 0).all()
    names = ("rewards_good", "rewards_bad") if name == "kto" else ("rewards_chosen", "rewards_rejected")
    assert output.metrics[names[0]].item() == pytest.approx(sum(rewards[0::2]), rel=1e-5)
    assert output.metrics[names[1]].item() == pytest.approx(sum(rewards[1::2]), rel=1e-5)
    assert set(output.metrics) == set(objective.metric_names)


@pytest.mark.parametrize("kind", ["dpo", "orpo", "simpo", "kto"])
def test_of_no_replies_the_loss_is_0_with_a_graph_through_the_head(kind: str):
    batch = Collator(None, 0, 1, pad_to=8)([[]])
    weight = torch.ones(5, 3, requires_grad=True)
    objective = OBJECTIVES[kind]().build()
    output = objective.loss(torch.zeros(1, 8, 3), batch, Head(lambda states: states @ weight.T))
    output.loss.backward()
    assert (output.loss.item(), objective.normalizer(batch)) == (0.0, 0)
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("shares", [True, False])
def test_the_score_of_a_reply_is_the_sum_over_its_own_tokens(shares: bool):
    """Each token is predicted by the state before it; of a reply that shares its question, the question's last."""
    one, other = (Example([1, 2, *reply], [X, X, *reply]) for reply in ([3, 4], [4]))
    pair = Example(one.input_ids, one.labels, rejected=other)
    batch = Collator(None, 0, 1, pad_to=8, shares_questions=shares)([[pair]])
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    logits = table.log_softmax(-1)
    states = torch.nn.functional.one_hot(batch.input_ids, 5).float()

    def head(states: Tensor) -> Tensor:
        return states @ table

    scores = score_replies(states, batch, Head(head))
    assert scores.log_probs.tolist() == pytest.approx([float(logits[2, 3] + logits[3, 4]), float(logits[2, 4])])
    assert scores.num_tokens.tolist() == [2, 1]


def test_a_key_that_changes_nothing_is_refused(config_file):
    section = {"kind": "dpo", "loss": "ipo", "label_smoothing": 0.1}
    with pytest.raises(ConfigError, match="label_smoothing is of loss: sigmoid, not of ipo"):
        load_config(config_file(objective=section))


@pytest.fixture
def preferences(config_file, tiny: Path, tmp_path: Path):
    """Writes a config whose records compare the caption of an image with that of another one."""
    lines = [json.loads(line) for line in (tiny / "data/finetune.jsonl").read_text().splitlines()[:12]]
    asked, said = ([line["conversations"][turn]["value"] for line in lines] for turn in (0, 1))
    pairs = [
        {"image": line["image"], "prompt": q, "chosen": good, "rejected": bad}
        for line, q, good, bad in zip(lines, asked, said, [*said[1:], *said[:1]], strict=True)
        if good != bad
    ]
    judged = [
        {"image": pair["image"], "prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen"}
        for pair in pairs
        for key in ("chosen", "rejected")
    ]

    def write(kind: str, **changes: Any) -> Path:
        records = judged if kind == "kto" else pairs
        (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        source = {"path": str(tmp_path / "records.jsonl"), "images": str(tiny / "data/images")}
        settings = {"data__held_out": 0.0, "data__max_length": 192, "train__micro_batch_size": 1} | changes
        return config_file(objective={"kind": kind}, data__sources=[source], **settings)

    return write


def test_the_plan_counts_pairs_and_tokens_of_both_replies(preferences, tmp_path: Path):
    path = preferences("dpo", data__packing=False)
    num_pairs = len((tmp_path / "records.jsonl").read_text().splitlines())
    found = read_some(load_config(path))
    assert isinstance(found, Records)
    assert (found.num_records, found.num_rows) == (num_pairs, num_pairs)
    assert found.row.images == 2


def test_a_reference_is_of_its_own_data_and_start(tmp_path: Path):
    def data_of(digest: str) -> Any:
        scan = SimpleNamespace(lengths=np.ones(2), digest=lambda: digest)
        return SimpleNamespace(scans=(scan,), train=SimpleNamespace(fingerprint="rows", earlier_fingerprint="old"))

    data, path, tables = data_of("one"), tmp_path / REFERENCE, [np.array([[-1, -2], [-3, np.nan]], dtype=np.float32)]
    start = _digest(data, {"seed": 0})
    _write(path, tables, start, _digest(data, {}))
    for digest in (start, None):  # a new run, and one that goes on
        assert np.array_equal((_read(path, data, digest) or [])[0], tables[0], equal_nan=True)
    assert _read(path, data, _digest(data, {"seed": 1})) is None
    assert _read(path, data_of("held-out records of the same number"), None) is None
    _write(path, tables, start, _digest(data, {}, "old"))  # by an earlier version
    assert _read(path, data, None) is not None
    _write(path, tables, start, _digest(data, {}, "of other rows"))
    assert _read(path, data, None) is None


def lines_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.slow
def test_a_run_starts_where_it_cannot_be_told_from_its_reference_and_learns_to_tell_the_replies_apart(preferences):
    path = preferences("dpo", train__max_steps=6)
    run = train(load_config(path), path.read_text())
    lines = lines_of(run)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(lines[0]["margin"]) < 1e-6
    assert lines[-1]["margin"] > 0.01
    assert lines[-1]["accuracy"] > 0.7
    proof = {check["name"]: check["passed"] for check in json.loads((run / "proof.json").read_text())["checks"]}
    assert {proof[name] for name in ("loss", "gradients", "micro_batches", "shared_image")} == {True}


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_engines_agree_on_pairs_and_on_their_reference(preferences, tmp_path: Path):
    """Worst seen: loss 1.2e-7, norm 2.2e-7, weights 5e-9. Of a language model by itself nothing before the first
    adapters has a gradient."""

    path = preferences("dpo", model__lora={"rank": 4, "alpha": 8}, engine={"timeout_seconds": 60})
    texts = [{"prompt": f"Is {n} odd?", "chosen": "Yes."[:n], "rejected": f"No, {n}."} for n in range(1, 9)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    by_itself = (
        "model.vision=null", "model.trainable=[llm.lora]", f"data.sources=[{{path: {tmp_path / 'texts.jsonl'}}}]",
    )  # fmt: skip
    kinds = (((), ("local", "zero3*2", "fsdp*2", "pipeline2*2")), (by_itself, ("local", "zero3*2", "fsdp*2")))
    groups = [[Case(each, ("train.precision=fp32", *kind)) for each in engines] for kind, engines in kinds]
    outcomes = run_cases(str(path), [case for group in groups for case in group], 4, tmp_path, start_warm)
    for group in groups:
        reference = outcomes[group[0]]
        assert reference.losses[0] == pytest.approx(math.log(2), abs=1e-6)
        for case in group[1:]:
            found = worst_differences(reference, outcomes[case])
            assert all(value <= bound for value, bound in zip(found, (1e-6, 1e-5, 5e-6), strict=True)), (case, found)
            assert outcomes[case].metrics[-1] == pytest.approx(reference.metrics[-1], rel=1e-4, abs=1e-6), case


@pytest.mark.one_in(2)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_run_that_was_stopped_goes_on_to_the_bit_with_the_reference_it_began_with(preferences, kind, tmp_path):
    path = preferences(kind, train__max_steps=6, train__save_every=3)
    whole = train(load_config(path), path.read_text())
    again = stop_and_go_on(path, tmp_path / "other")
    names = ("loss", "grad_norm", *OBJECTIVES[kind]().build().metric_names)
    assert [[line[name] for name in names] for line in lines_of(again)] == [
        [line[name] for name in names] for line in lines_of(whole)
    ]
    before = sorted((file, file.stat().st_mtime_ns) for file in whole.rglob("*"))
    blame = blame_step(load_config(path), 5)  # reads the reference too
    assert (blame.from_step, blame.is_same) == (3, True)
    assert blame.grad_norm == pytest.approx(blame.told_grad_norm, rel=1e-5)
    assert sorted((file, file.stat().st_mtime_ns) for file in whole.rglob("*")) == before
    (again / REFERENCE).unlink()
    with pytest.raises(CheckpointError, match="the log-probabilities of the model that this run started from are miss"):
        train(load_config(path, [f"output_dir={again}", "train.max_steps=8"]), path.read_text())


@pytest.mark.thorough
@pytest.mark.slow
def test_a_run_that_was_killed_while_it_computed_its_reference_begins_again_to_the_bit(preferences, tmp_path):
    """Of two processes one is killed, after the first batch of the pass."""
    path = preferences("dpo", train__max_steps=2, train__prove=False, engine={"kind": "ddp", "timeout_seconds": 60})
    (whole,) = train_with_engines(path, ["ddp*2"], tmp_path / "whole").values()
    again = tmp_path / "again/ddp*2"
    kill(path, f"output_dir={again}", fault="reference/1")
    assert not (again / REFERENCE).exists()
    assert not (again / "metrics.jsonl").exists()
    train_with_engines(path, ["ddp*2"], tmp_path / "again")
    assert (again / REFERENCE).read_bytes() == (whole / REFERENCE).read_bytes()
    names = ("loss", "grad_norm", *OBJECTIVES["dpo"]().build().metric_names)
    assert [[line[name] for name in names] for line in lines_of(again)] == [
        [line[name] for name in names] for line in lines_of(whole)
    ]
    expected, found = (read_weights(newest_verified(run)) for run in (whole, again))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
