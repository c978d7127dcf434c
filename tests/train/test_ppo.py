"""PPO: advantages, the loss against its formulas, and a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from demo.tiny import write_llm
from safetensors.torch import load_file

from vlm.batch import Batch, Prompt
from vlm.config import load_config
from vlm.data.collate import Collator
from vlm.errors import ConfigError
from vlm.export.run import export_run
from vlm.inference.load import load
from vlm.inference.reward import open_judge
from vlm.models.loss import find_supervised
from vlm.models.trainable import part_of
from vlm.objectives.base import Head
from vlm.objectives.ppo import ClippedPolicyAndValue, PPOConfig, estimate_advantages
from vlm.run import train
from vlm.train.checkpoint import newest_verified
from vlm.train.fragments import read_weights
from vlm.train.rollout_rows import Group, RowMaker
from vlm.train.rollouts import Rollouts, _advantages, with_scores

REPLIES = [[5, 6, 2], [7, 2]]  # 2 ends a reply
QUESTION = [3, 4, 1]


def rows_of(rewards: list[float]) -> Batch:
    group = Group(Prompt(QUESTION, 0, "a", "r"), REPLIES, rewards)
    return RowMaker(Collator(None, 0, 1), 64, shares=True, packs=True)([group], Batch(*[torch.zeros(1, 1)] * 3), None)


@pytest.mark.parametrize(("discount", "smoothing"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0)])
def test_advantages_are_the_sum_of_the_paper(discount: float, smoothing: float):
    rewards, values = [-0.1, 0.2, 0.7], [0.5, -0.3, 0.4]
    deltas = [r + discount * after - v for r, v, after in zip(rewards, values, [*values[1:], 0.0], strict=True)]
    expected = [sum((discount * smoothing) ** (later - t) * deltas[later] for later in range(t, 3)) for t in range(3)]
    found = estimate_advantages([1.0], [0, 0, 0], values, [0.1, -0.2, 0.3], discount, smoothing)
    assert found == pytest.approx(expected)


def test_a_reward_counts_at_the_last_token_of_its_reply_and_leaving_the_reference_at_each():
    batch = rows_of([1.0, -1.0])
    said, reference = torch.tensor([-1.0, -2.0, -3.0, -1.0, -1.0]), torch.tensor([-1.5, -2.0, -1.0, -1.0, -3.0])
    settings = PPOConfig(rewards=[{"kind": "exact"}], kl=0.1, smoothing=0.0)
    found = _advantages(with_scores(batch, reference=reference), said, torch.zeros(5), settings)
    assert found.penalties.tolist() == pytest.approx([0.05, 0.0, -0.2, 0.0, 0.2])
    assert found.leads.tolist() == pytest.approx([-0.05, 0.0, 1.2, 0.0, -1.2])


@pytest.mark.parametrize("rewards", [[1.0, -1.0], [0.0, 0.0]])
def test_advantages_of_a_step_have_mean_0_and_the_samples_deviation_and_returns_stay(rewards: list[float]):
    """As TRL 0.24 whitens them; where all are alike they are 0."""
    batch = with_scores(rows_of(rewards), reference=torch.zeros(5))
    values = torch.tensor([0.3, -0.2, 0.1, 0.4, 0.0]) * any(rewards)
    read = SimpleNamespace(found=[torch.zeros(5)], values=[values])
    settings = PPOConfig(rewards=[{"kind": "exact"}], kl=0.0, smoothing=1.0)
    rollouts = SimpleNamespace(_read=lambda *_: read, engine=SimpleNamespace(sum_over_data_ranks=lambda sums: sums))
    (made,), _ = Rollouts._valued(rollouts, [batch], settings)  # type: ignore[arg-type]
    row, _, at = find_supervised(batch.labels, batch.position_ids)
    leads = torch.tensor([rewards[0]] * 3 + [rewards[1]] * 2) - values
    assert made.rollouts is not None
    assert made.rollouts.returns is not None
    expected = (leads - leads.mean()) / (leads.var(correction=1) + 1e-8).sqrt()
    assert torch.allclose(made.rollouts.advantages[row, at], expected, atol=1e-6)
    assert torch.allclose(made.rollouts.returns[row, at], leads + values)


def test_the_loss_is_the_formula_token_by_token():
    """TRL 0.24, PPOTrainer: pg_loss + vf_coef * vf_loss, both means over tokens."""
    table = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    batch = rows_of([0.0, 0.0])
    states = torch.nn.functional.one_hot(batch.input_ids, 8).float()
    before = [1, 5, 6, 1, 7]  # the token before each supervised one
    after = [5, 6, 2, 7, 2]
    said = torch.stack([(table / 0.7).log_softmax(-1)[a, b] for a, b in zip(before, after, strict=True)])
    values = weight[before]
    old = said.detach() - torch.tensor([0.5, -0.5, 0.0, 0.1, -0.1])
    past = values.detach() + torch.tensor([0.5, -0.5, 0.1, 0.0, 0.3])
    worth, returns = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0]), torch.tensor([0.2, -0.4, 1.0, 0.0, -1.0])
    ratio = torch.exp(said - old)
    policy = torch.max(-worth * ratio, -worth * ratio.clamp(0.8, 1.2)).mean()
    near = torch.clamp(values, past - 0.2, past + 0.2)
    expected = policy + 0.1 * 0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2).mean()

    objective = ClippedPolicyAndValue(temperature=0.7, clip=0.2, value_clip=0.2, value_weight=0.1)
    scored = with_scores(batch, old=old, advantages=worth, values=past, returns=returns)
    output = objective.loss(states, scored, Head(lambda s: s @ table, values=lambda s: s @ weight))
    loss = output.loss / objective.normalizer(scored)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for parameter in (table, weight):
        ours, theirs = (torch.autograd.grad(each, parameter, retain_graph=True)[0] for each in (loss, expected))
        assert torch.allclose(ours, theirs, atol=1e-7)
    assert set(output.metrics) == set(objective.metric_names)


@pytest.mark.slow
def test_a_run_learns_what_is_rewarded_goes_on_as_if_it_had_not_stopped_and_is_exported_to_write(
    config_file: Any, tiny: Path, tmp_path: Path
):
    lines = [{"prompt": f"Say {n}", "answer": "x"} for n in range(8)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    objective = {
        "kind": "ppo",
        "rewards": [{"kind": "regex", "pattern": "[a-z]$"}],
        "group_size": 8,
        "max_new_tokens": 2,
    }
    path = config_file(
        objective=objective, model__vision=None, model__trainable=["llm", "value_head"], data__held_out=0.0,
        data__sources=[{"path": str(tmp_path / "asked.jsonl")}], train__log_every=1, train__max_steps=20,
        data__eval_sources=[{"path": str(tmp_path / "asked.jsonl")}],
        train__eval_every=20, train__save_every=10, train__learning_rate=1e-2,
    )  # fmt: skip
    run = train(load_config(path), path.read_text())
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in found if "loss" in line]
    (held_out,) = (line for line in found if "held_out_loss" in line)
    assert held_out.keys() == {"step", "held_out_loss", "held_out_tokens"}  # clipped is of rollouts
    rewards = [line["reward"] for line in lines]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3, rewards
    assert {"kl", "value", "value_loss", "clipped", "reward/regex", "reward_std"} <= lines[-1].keys()
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6)  # the model that it starts from
    assert lines[-1]["kl"] > 0
    straight = read_weights(newest_verified(run))
    assert {part_of(name) for name in straight} == {"llm", "value_head"}
    shutil.rmtree(run / "checkpoints/step-000020")
    train(load_config(path), path.read_text())
    again = read_weights(newest_verified(run))
    assert all(torch.equal(again[name], tensor) for name, tensor in straight.items())
    exported = json.loads((export_run(run) / "vlm.json").read_text())
    assert exported["included"] == ["llm"]
    assert load(run / "export").model.value_head is None


@pytest.mark.slow
def test_a_reward_model_judges_what_another_model_writes_if_it_reads_the_same_tokens(
    config_file: Any, tiny: Path, tmp_path: Path
):
    pair, asked = {"prompt": "Say", "chosen": "yes", "rejected": "no"}, {"prompt": "Say", "answer": "x"}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 8)
    (tmp_path / "asked.jsonl").write_text(f"{json.dumps(asked)}\n" * 8)
    common = {
        "model__vision": None, "model__trainable": ["llm.lora", "value_head"], "data__held_out": 0.0,
        "data__sources": [{"path": str(tmp_path / "asked.jsonl")}], "train__max_steps": 2, "train__log_every": 1,
    }  # fmt: skip
    path = config_file("rm.yaml", output_dir=str(tmp_path / "rm"), objective={"kind": "reward"},
                       **common | {"data__sources": [{"path": str(tmp_path / "pairs.jsonl")}]})  # fmt: skip
    judge = export_run(train(load_config(path), path.read_text()))
    objective = {"kind": "ppo", "rewards": [{"kind": "model", "path": str(judge)}], "max_new_tokens": 3}
    path = config_file(objective={**objective, "shown_groups": 4}, **common)
    run = train(load_config(path), path.read_text())
    groups = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    scores = [group["replies"][0]["reward"] for group in groups if group["step"] == 1]
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert len(set(scores)) > 1
    assert line["reward"] == line["reward/model"] == pytest.approx(sum(scores) / len(scores), abs=1e-6)

    tokens, cpu = load(tiny / "llm", "cpu", "fp32").conversation_tokenizer, torch.device("cpu")
    drawn = torch.get_rng_state()
    open_judge(str(judge), tokens, cpu, 96, 10**6)
    assert torch.get_rng_state().equal(drawn)
    with pytest.raises(ConfigError, match=r"reads at most 2,048 tokens, data\.max_length is 4,096"):
        open_judge(str(judge), tokens, cpu, 4096, 10**6)

    write_llm(tmp_path / "other", ["quite different words"])
    path = config_file("other.yaml", output_dir=str(tmp_path / "other_run"), objective=objective,
                       model__llm={"path": str(tmp_path / "other")}, **common)  # fmt: skip
    with pytest.raises(ConfigError, match="does not read the tokens of the model that writes: vocabulary"):
        train(load_config(path), path.read_text())


@pytest.mark.slow
def test_an_output_layer_of_its_own_trains_with_the_rest_and_stays_as_it_is_beside_adapters(
    config_file: Any, tiny: Path, tmp_path: Path
):
    from transformers import LlamaForCausalLM

    shutil.copytree(tiny / "llm", tmp_path / "llm")
    llm = LlamaForCausalLM.from_pretrained(tiny / "llm", tie_word_embeddings=False)
    llm.lm_head.weight = torch.nn.Parameter(llm.get_input_embeddings().weight.detach().clone())
    llm.save_pretrained(tmp_path / "llm")
    (tmp_path / "asked.jsonl").write_text(f"{json.dumps({'prompt': 'Say', 'answer': 'x'})}\n" * 8)
    common = {
        "model__vision": None, "model__llm": {"path": str(tmp_path / "llm")}, "data__held_out": 0.0,
        "data__sources": [{"path": str(tmp_path / "asked.jsonl")}], "train__max_steps": 1, "train__prove": False,
    }  # fmt: skip

    def export(name: str, *trainable: str, **changes: Any) -> Path:
        changes |= {"output_dir": str(tmp_path / name), "model__trainable": trainable}
        path = config_file(f"{name}.yaml", **common, **changes)
        return export_run(train(load_config(path), path.read_text()))

    first = export("sft", "llm", train__learning_rate=0.1)
    objective = {"kind": "ppo", "rewards": [{"kind": "exact"}], "max_new_tokens": 2, "kl": 0.0}
    start = {"objective": objective, "init_from": str(first)}
    exports = [first, export("whole", "llm", "value_head", **start), export("lora", "llm.lora", "value_head", **start)]
    heads = [load_file(next((folder / "llm").glob("*.safetensors")))["lm_head.weight"] for folder in exports]
    assert not heads[0].equal(load_file(tmp_path / "llm/model.safetensors")["lm_head.weight"])
    assert not heads[0].equal(heads[1])
    assert heads[0].equal(heads[2])
    assert load(exports[2]).model.value_head is None
