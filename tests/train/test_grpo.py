"""Replies that the model writes itself: what they are worth, the rows they lie in, the loss, and runs that learn."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from walk import registered

from vlm.batch import Batch, Example, Prompt
from vlm.config import load_config
from vlm.config_checks import run_notes
from vlm.config_paths import run_problems
from vlm.data.collate import Collator
from vlm.errors import ConfigError
from vlm.generation.batched import SharedPrompt
from vlm.models.build import build_model
from vlm.models.config import ModelConfig
from vlm.objectives.base import Head
from vlm.objectives.grpo import ClippedPolicy, GRPOConfig
from vlm.objectives.rewards import REWARDS, OneByOne, Written
from vlm.plan.estimate import estimate
from vlm.plan.report import full_report
from vlm.train.engines.base import LossModule
from vlm.train.rollout_rows import Group, RowMaker
from vlm.train.rollouts import Rollouts, _attending_by_masks, with_scores

REPLIES = [[5, 6, 2], [7, 2], [5, 2]]  # 2 ends a reply
WORTH = [1.0, -0.5, 0.7]
QUESTION = [3, 4, 1]


def rows_of(shares: bool = True, packs: bool = True, max_length: int = 64) -> Batch:
    group = Group(Prompt(QUESTION, 0, "a", "r"), REPLIES, WORTH)
    return RowMaker(Collator(None, 0, 1), max_length, shares, packs)([group], Batch(*[torch.zeros(1, 1)] * 3), None)


def test_a_question_stands_once_and_each_reply_follows_it_by_itself():
    batch = rows_of()
    assert batch.input_ids[0, :10].tolist() == [3, 4, 1, 5, 6, 2, 7, 2, 5, 2]
    assert batch.position_ids[0, :10].tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 3, 4]
    assert batch.rollouts is not None
    assert batch.rollouts.number[0, 3:11].tolist() == [0, 0, 0, 1, 1, 2, 2, -1]
    assert batch.rollouts.advantages[0, 5:9].tolist() == pytest.approx([1.0, -0.5, -0.5, 0.7])
    assert rows_of(max_length=8).input_ids.tolist() == [[3, 4, 1, 5, 6, 2, 7, 2], [3, 4, 1, 5, 2, 0, 0, 0]]
    assert len(rows_of(packs=False).input_ids) == 3


def written(text: str, answer: str = "B. 4 cats", num_tokens: int = 3, is_whole: bool = True) -> Written:
    return Written("Q", text, answer, num_tokens, is_whole, Example([], []))


@pytest.mark.parametrize(
    ("settings", "good", "bad"),
    [
        ({"kind": "exact"}, " B.  4 cats", "b. 4 cats"),
        ({"kind": "exact", "ignore_case": True}, "b. 4 cats.", "B. 4 dogs"),
        ({"kind": "choice"}, "The answer is (b)", "A. 4 cats"),
        ({"kind": "number"}, "2 + 2 = 4.0", "4 or 5"),
        ({"kind": "regex", "pattern": "cats?"}, "a cat", "a dog"),
        ({"kind": "regex", "pattern": "<a>(?P<answer>.*?)</a>"}, "so\n<a>B. 4 cats </a>", "<a>C</a>"),
        ({"kind": "format", "pattern": "<t>.*</t> *B"}, "<t>1\n2</t> B", "<t></t> B."),
        ({"kind": "length", "least": 2, "most": 3}, written("x"), written("x", num_tokens=4)),
        ({"kind": "length", "most": 3}, written("x"), written("x", is_whole=False)),
    ],
)
def test_what_a_reply_is_worth(settings: dict[str, Any], good: Any, bad: Any):
    reward = REWARDS[settings["kind"]](**settings).build()
    replies = [each if isinstance(each, Written) else written(each) for each in (good, bad)]
    assert reward(replies) == [1.0, 0.0]


class PoliteReward(OneByOne):
    kind: Literal["polite"] = "polite"
    """The reply says please."""

    def of(self, written: Written) -> float:
        return "please" in written.text.lower()


def test_another_reward_is_a_class_and_a_line():
    with registered(REWARDS, PoliteReward):
        section = REWARDS["polite"](weight=0.5)
        assert section.build()([written("Please, a cat"), written("A cat")]) == [1.0, 0.0]
        assert (section.label, section.weight) == ("polite", 0.5)


def test_the_plan_counts_the_copy_and_all_replies_of_a_prompt(config_file: Any):
    objective = {"kind": "grpo", "rewards": [{"kind": "exact"}], "max_new_tokens": 24, "group_size": 8}
    text = {"model__vision": None, "model__trainable": ["llm"], "model__lora": None, "data__max_length": 96}
    config = load_config(config_file(objective=objective, **text))
    held = load_config(config_file(objective=objective | {"kl": 0.1}, **text))
    plan, with_copy = estimate(config), estimate(held)
    assert plan.micro_batch_size == 2 * 3  # two prompts, and 9 x 24 tokens of each in rows of 96
    assert with_copy.devices[0].parameters - plan.devices[0].parameters == 4 * plan.num_trained
    lines = full_report(config, 1, 8 << 30, "a machine")
    assert any(line.startswith("time: not estimated, as it is that of writing replies") for line in lines)


@contextmanager
def judge(answers: list[tuple[int, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """A program that gives these answers, one for each request; its address, and what it was sent."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, content = answers[len(asked) - 1]
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/judge", asked
    finally:
        server.shutdown()
        server.server_close()


def test_a_judge_elsewhere_is_asked_at_its_address_alone_and_may_fail():
    ok, wrong, moved, broken = (200, {"rewards": [0.5, 1]}), (200, {"rewards": [1]}), (302, {}), (500, {})
    endless = (200, {"rewards": [10**400, 1]})
    with judge([ok, wrong, moved, broken, endless]) as (address, asked):
        reward = REWARDS["http"](address=address, timeout_seconds=5).build()
        found = [reward([written("x"), written("y")]) for _ in range(5)]
    assert found == [[0.5, 1.0], *[[None, None]] * 4]
    assert [reply["text"] for reply in asked[0]["replies"]] == ["x", "y"]
    assert set(asked[0]["replies"][0]) == {"prompt", "text", "answer", "num_tokens", "is_whole"}
    assert len(asked) == 5  # nobody was asked twice
    assert reward([written("x")]) == [None]  # it is gone


SETTINGS = {"temperature": 0.7, "clip_low": 0.2, "clip_high": 0.3, "kl": 0.1, "max_new_tokens": 5}


def by_hand(said: list[list[Tensor]], old: list[list[float]], before: list[list[float]], average: str) -> Tensor:
    """The formulas of DeepSeekMath (arXiv:2402.03300, eq. 3 and 4), reply by reply, token by token."""
    losses = []
    for reply, (said_, old_, before_) in enumerate(zip(said, old, before, strict=True)):
        for now, then, first in zip(said_, old_, before_, strict=True):
            ratio = torch.exp(now - then)
            clipped = min(max(ratio.item(), 0.8), 1.3)
            gain = min((ratio * WORTH[reply], torch.tensor(clipped * WORTH[reply])), key=lambda value: value.item())
            kl = torch.exp(first - now) - (first - now) - 1
            losses.append((reply, len(said_), 0.1 * kl - gain))
    total, replies = sum(count for _, count, _ in {(r, n, None) for r, n, _ in losses}), len(said)
    if average == "tokens":
        return sum(loss for *_, loss in losses) / total
    if average == "replies":
        return sum(loss / count for _, count, loss in losses) / replies
    return sum(loss for *_, loss in losses) / (replies * 5)


@pytest.mark.parametrize("average", ["tokens", "replies", "constant"])
def test_the_loss_is_the_formula_token_by_token(average: Any):
    batch = rows_of()
    table = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    states = torch.nn.functional.one_hot(batch.input_ids, 8).float()
    logits = (table / 0.7).log_softmax(-1)
    said = [[logits[a, b] for a, b in zip([1, *reply], reply, strict=False)] for reply in REPLIES]
    moved = torch.linspace(-0.6, 0.6, 7).split([3, 2, 2])
    old = [[s.item() - m.item() for s, m in zip(*both, strict=True)] for both in zip(said, moved, strict=True)]
    before = [[s.item() + 0.3 * m.item() for s, m in zip(*both, strict=True)] for both in zip(said, moved, strict=True)]
    expected = by_hand(said, old, before, average)
    flat = [torch.tensor([value for reply in each for value in reply]) for each in (old, before)]
    scored = with_scores(batch, old=flat[0], reference=flat[1])
    objective = ClippedPolicy(**SETTINGS, average=average)
    output = objective.loss(states, scored, Head(lambda states: states @ table))
    loss = output.loss / objective.normalizer(scored)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ours, theirs = (torch.autograd.grad(each, table, retain_graph=True)[0] for each in (loss, expected))
    assert torch.allclose(ours, theirs, atol=1e-7)
    assert set(output.metrics) == set(objective.metric_names) == {"clipped", "kl"}
    assert 0 < output.metrics["clipped"] / objective.normalizer(scored) < 1
    assert objective.normalizer(scored) == {"tokens": 7, "replies": 3, "constant": 15}[average]


def test_weights_that_wrote_the_replies_have_a_ratio_of_1_and_a_batch_of_none_has_a_graph():
    objective = ClippedPolicy(**SETTINGS | {"kl": 0.0}, average="tokens")
    weight = torch.ones(5, 3, requires_grad=True)
    maker = RowMaker(Collator(None, 0, 1), 64, shares=True, packs=True)
    empty = maker([], Batch(*[torch.zeros(1, 1)] * 3), None)
    output = objective.loss(torch.zeros(1, 8, 3), empty, Head(lambda states: states @ weight.T))
    output.loss.backward()
    assert (output.loss.item(), objective.normalizer(empty)) == (0.0, 0)
    assert weight.grad is not None
    assert not weight.grad.any()
    batch = rows_of()
    states = torch.nn.functional.one_hot(batch.input_ids, 8).float()
    output = objective.loss(states, batch, Head(lambda states: states @ torch.eye(8)))
    assert output.loss.item() == pytest.approx(-(3 * 1.0 - 2 * 0.5 + 2 * 0.7))
    assert not output.metrics["clipped"]


def test_records_that_nobody_judged_were_seen():
    source = Batch(*[torch.zeros(1, 1)] * 3, prompts=(Prompt(QUESTION, 0, "a", "r"),))  # type: ignore[arg-type]
    assert RowMaker(Collator(None, 0, 1), 64, shares=True, packs=True)([], source, None).where == ["r"]


@pytest.mark.parametrize(("placeholder", "never"), [(3, {3: -math.inf}), (9, {}), (None, {})])
def test_a_reply_never_holds_a_placeholder_for_an_image(placeholder: int | None, never: dict[int, float]):
    llm = SimpleNamespace(get_output_embeddings=lambda: torch.nn.Linear(4, 8))
    model: Any = SimpleNamespace(image_token_id=placeholder, llm=llm)
    settings = GRPOConfig(rewards=[{"kind": "exact"}])
    rollouts = Rollouts(
        settings, SimpleNamespace(model=model), seed=0, tokenizer=SimpleNamespace(),  # type: ignore[arg-type]
        make_rows=RowMaker(Collator(None, 0, 1), 64, shares=True, packs=True), start=None, rewards={}, show=print,
    )  # fmt: skip
    assert rollouts._reply(Prompt(QUESTION, 0, "a", "r"), SharedPrompt(), [], 0).settings.logit_bias == never


def test_training_has_its_attention_back_after_replies_were_written():
    config = SimpleNamespace(_attn_implementation="flash_attention_2")
    llm = SimpleNamespace(
        config=config, set_attn_implementation=lambda name: setattr(config, "_attn_implementation", name)
    )
    with _attending_by_masks(SimpleNamespace(llm=llm)):  # type: ignore[arg-type]
        assert config._attn_implementation == "sdpa"
    assert config._attn_implementation == "flash_attention_2"


@pytest.mark.slow
def test_loss_and_gradient_are_those_of_each_reply_alone(tiny: Path):
    config = ModelConfig(vision=None, llm={"path": str(tiny / "llm")}, trainable=("llm",), gradient_checkpointing=False)
    model = build_model(config, precision="fp32", device="cpu", seed=0).model.eval()
    objective = ClippedPolicy(**SETTINGS | {"kl": 0.0}, average="tokens")
    found = {}
    for name, batch in {"shared": rows_of(), "packed": rows_of(shares=False)}.items():
        loss = LossModule(model, objective)(batch)[0] / objective.normalizer(batch)
        loss.backward()
        found[name] = loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    losses = []
    for reply, worth in zip(REPLIES, WORTH, strict=True):
        ids = torch.tensor([[*QUESTION, *reply]])
        logits = model.llm(input_ids=ids).logits[0, len(QUESTION) - 1 : -1] / 0.7
        said = logits.log_softmax(-1).gather(1, ids[0, len(QUESTION) :, None])[:, 0]
        losses.append(-(torch.exp(said - said.detach()) * worth).sum())
    loss = sum(losses) / 7
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    for value, gradient in found.values():
        assert value == pytest.approx(loss.item(), rel=1e-6)
        assert ((gradient - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": {"kind": "pipeline"}}, "holds each layer in one process; set engine.kind to ddp, zero or fsdp"),
        ({"objective__kl": 0.1}, "whose projector is random without init_from"),
        ({"objective__rewards": [{"kind": "exact"}, {"kind": "exact"}]}, "exact stands twice; give each a name"),
        ({"objective__rewards": [{"kind": "exact", "weight": 0}]}, "every weight is 0"),
        ({"objective__rewards": [{"kind": "exact", "weight": math.nan}]}, "expected a finite number"),
        ({"objective__temperature": math.inf}, "temperature: expected a finite number"),
        ({"objective__rewards": [{"kind": "regex", "pattern": "("}]}, "is not a regular expression"),
        ({"objective__rewards": [{"kind": "http", "address": "file:///etc"}]}, "is not an address such as http"),
        ({"objective__rewards": [{"kind": "http", "address": "http://me:pw@a/"}]}, "is not an address such as http"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(config_file: Any, changes: dict, message: str):
    objective = {"kind": "grpo", "rewards": [{"kind": "exact"}]}
    with pytest.raises(ConfigError, match=message):
        load_config(config_file(objective=objective, **changes))


def test_a_reward_model_that_is_none_is_refused_before_anything_is_loaded(config_file: Any, tmp_path: Path):
    """At its key, whether it is not there or another export."""
    for path, told in ((tmp_path / "none", "none does not exist"), (tmp_path, "is not an export of a reward model")):
        rewards = [{"kind": "exact"}, {"kind": "model", "path": str(path)}]
        checked = load_config(config_file(objective={"kind": "grpo", "rewards": rewards}))
        ((key, problem),) = run_problems(checked)
        assert key == ("objective", "rewards", 1, "path")
        assert told in problem
    (tmp_path / "vlm.json").write_text(json.dumps({"included": ["llm", "value_head"]}))
    assert run_problems(checked) == []


def test_a_reference_that_sees_no_image_is_warned_of(config_file: Any):
    for kind, count in (("dpo", 1), ("kto", 1), ("orpo", 0), ("lm", 0)):
        lines = run_notes(load_config(config_file(objective={"kind": kind})))
        assert sum("is random without init_from" in line for line in lines) == count
