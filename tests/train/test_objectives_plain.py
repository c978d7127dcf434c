"""Replies about images, packed and sharing as a run lays them out, against each of them alone: modules of transformers,
and the formulas of the papers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from vlm.batch import IGNORE_INDEX, Batch, Example
from vlm.data.collate import Collator
from vlm.models.build import Assembled, build_model
from vlm.models.config import ModelConfig
from vlm.objectives import OBJECTIVES
from vlm.objectives.replies import ReplyScores
from vlm.train.engines.base import LossModule
from vlm.train.engines.local import LocalEngine
from vlm.train.rollout_rows import Group, RowMaker
from vlm.train.rollouts import Rollouts, with_scores

NOISE = 0.05  # between the reference, the model that wrote the replies and the policy, on every weight that trains
ASKED = (  # image, question, replies of which the first is preferred to the second, and rewards of them
    ("red-circle-1", "What is this?", ("A red circle.", "A blue cross.", "Red."), (1.0, 0.0, 0.4)),
    ("blue-cross-2", "Which shape is it?", ("A cross.", "A green circle and a square.", "A"), (0.3, 0.2, 0.9)),
    ("green-square-3", "What is this?", ("Green.", "A cross.", "A green square."), (0.0, 0.1, 1.0)),
)


@dataclass(frozen=True)
class Said:
    """What a model says of a reply of l tokens."""

    log_probs: Tensor  # float32 [l]
    values: Tensor  # float32 [l + 1], before each token and after the last; empty without a value head


@dataclass(frozen=True)
class Reply:
    reward: float
    start: Said  # by the reference
    old: Said  # by the model that wrote it
    policy: Said

    @property
    def gain(self) -> Tensor:
        return self.policy.log_probs.sum() - self.start.log_probs.sum()

    @property
    def mean(self) -> Tensor:
        return self.policy.log_probs.mean()


class PlainModel(nn.Module):
    """Reads one reply, of one image. The language model is transformers' own; weights have the names of ours."""

    def __init__(self, built: Assembled, llm: Path) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__()
        ours = deepcopy(built.model)
        self.vision: Any = ours.vision
        self.projector: Any = ours.projector
        self.value_head = ours.value_head
        self.llm: Any = AutoModelForCausalLM.from_pretrained(llm, attn_implementation="eager")
        self.spec: Any = built.image_spec
        self.placeholder: Any = built.image_token_id

    def forward(self, example: Example, temperature: float) -> Said:
        pixels = (np.asarray(Image.open(example.images[0])) / 255 - self.spec.mean) / self.spec.std
        features = self.projector(self.vision(torch.tensor(pixels).float().permute(2, 0, 1)[None]))[0]
        ids, at = torch.tensor(example.input_ids), example.input_ids.index(self.placeholder)
        words = self.llm.get_input_embeddings()
        embeddings = torch.cat([words(ids[:at]), features, words(ids[at + len(features) :])])
        output = self.llm(inputs_embeds=embeddings[None], output_hidden_states=True)
        first = len(ids) - example.num_supervised
        log_probs = (output.logits[0, first - 1 : -1] / temperature).log_softmax(-1)
        states = output.hidden_states[-1][0, first - 1 :]
        values = torch.empty(0) if self.value_head is None else self.value_head(states)[:, 0]
        return Said(log_probs.gather(1, ids[first:, None])[:, 0], values)


Groups = Sequence[Sequence[Reply]]  # the replies to each question
Formula = Callable[[Groups], tuple[Tensor, list[Tensor]]]  # mean loss, and sums as the first metrics are


def of_pairs(reward: Callable[[Reply], Tensor], loss: Callable[[Tensor, Tensor], Tensor]) -> Formula:
    """Of the first two replies to each question; the loss is one of their rewards."""

    def formula(groups: Groups) -> tuple[Tensor, list[Tensor]]:
        good, bad = (torch.stack([reward(group[number]) for group in groups]) for number in (0, 1))
        return loss(good, bad).mean(), [good.sum(), bad.sum()]

    return formula


def log_odds(mean: Tensor) -> Tensor:
    return mean - torch.log(1 - mean.exp())


def clipped_policy(reply: Reply, worth: Tensor) -> tuple[Tensor, Tensor]:
    """arXiv:1707.06347, eq. 7: the loss of each token, and whether it was clipped."""
    ratio = torch.exp(reply.policy.log_probs - reply.old.log_probs)
    gain, clipped = ratio * worth, ratio.clamp(0.8, 1.2) * worth
    return -torch.min(gain, clipped), clipped < gain


def grpo(groups: Groups) -> tuple[Tensor, list[Tensor]]:
    """arXiv:2402.03300, eq. 3 and 4, with a mean over all tokens (arXiv:2503.14476)."""
    losses, clipped, divergences = [], [], []
    for group in groups:
        rewards = torch.tensor([reply.reward for reply in group])
        for reply, worth in zip(group, (rewards - rewards.mean()) / (rewards.std() + 1e-4), strict=True):
            loss, is_clipped = clipped_policy(reply, worth)
            apart = reply.start.log_probs - reply.policy.log_probs
            divergence = torch.exp(apart) - apart - 1
            losses.append(loss + 0.1 * divergence)
            clipped.append(is_clipped)
            divergences.append(divergence)
    return torch.cat(losses).mean(), [torch.cat(clipped).sum(), torch.cat(divergences).sum()]


def advantages(reply: Reply) -> Tensor:
    """arXiv:1506.02438, eq. 16, of a reward at the last token and a penalty at each (arXiv:2009.01325)."""
    rewards = 0.05 * (reply.start.log_probs - reply.old.log_probs)
    rewards[-1] += reply.reward
    following = torch.cat([reply.old.values[1:-1], torch.zeros(1)])
    deltas = rewards + 0.9 * following - reply.old.values[:-1]
    return torch.stack(
        [sum((0.9 * 0.8) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]
    )


def ppo(groups: Groups) -> tuple[Tensor, list[Tensor]]:
    """arXiv:1707.06347, eq. 9 without the entropy; values are clipped as the policy is."""
    replies = [reply for group in groups for reply in group]
    leads = [advantages(reply) for reply in replies]
    std, mean = torch.std_mean(torch.cat(leads))
    policy, clipped, of_values = [], [], []
    for reply, lead in zip(replies, leads, strict=True):
        loss, is_clipped = clipped_policy(reply, (lead - mean) / std)
        values, before = reply.policy.values[:-1], reply.old.values[:-1]
        near = before + (values - before).clamp(-0.2, 0.2)
        returns = before + lead
        of_values.append(0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2))
        policy.append(loss)
        clipped.append(is_clipped)
    loss = (torch.cat(policy) + 0.1 * torch.cat(of_values)).mean()
    return loss, [torch.cat(clipped).sum(), torch.cat(of_values).sum()]


ROLLOUTS = {"rewards": [{"kind": "exact"}], "temperature": 0.9}
FORMULAS: dict[str, tuple[dict[str, Any], Formula]] = {  # objective -> its settings, and the formula with these
    "dpo": ({"beta": 0.3}, of_pairs(lambda reply: 0.3 * reply.gain, lambda good, bad: -logsigmoid(good - bad))),
    "kto": (
        {"beta": 0.3, "good_weight": 2.0},
        of_pairs(
            lambda reply: 0.3 * reply.gain,
            lambda good, bad: (2 * (1 - torch.sigmoid(good)) + 1 - torch.sigmoid(-bad)) / 2,  # a mean over replies
        ),
    ),
    "orpo": (
        {"beta": 0.3},
        of_pairs(
            lambda reply: 0.3 * reply.mean,
            lambda good, bad: -good / 0.3 - 0.3 * logsigmoid(log_odds(good / 0.3) - log_odds(bad / 0.3)),
        ),
    ),
    "simpo": (
        {"beta": 2.0, "gamma": 0.5},
        of_pairs(lambda reply: 2 * reply.mean, lambda good, bad: -logsigmoid(good - bad - 0.5)),
    ),
    "reward": ({}, of_pairs(lambda reply: reply.policy.values[-1], lambda good, bad: -logsigmoid(good - bad))),
    "grpo": (ROLLOUTS | {"kl": 0.1}, grpo),
    "ppo": (ROLLOUTS | {"kl": 0.05, "discount": 0.9, "smoothing": 0.8}, ppo),
}


def build(tiny: Path, objective: Any) -> Assembled:
    config = ModelConfig(
        vision={"backend": "hf", "path": str(tiny / "encoder"), "layer": -2},
        projector={"kind": "linear", "normalize": True},
        llm={"path": str(tiny / "llm")},
        trainable=("projector", "llm", "value_head") if objective.needs_value_head else ("projector", "llm"),
    )
    built = build_model(config, seed=0, scores=objective.scores)
    built.model.eval()
    return built


def add_noise(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """To every weight that trains; all weights after it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += NOISE * torch.randn(parameter.shape, generator=generator)
    return deepcopy(model.state_dict())


def write_examples(built: Assembled, images: Path) -> list[list[Example]]:
    """Of each question one for each reply."""
    spec: Any = built.image_spec

    def example(image: str, question: str, reply: str) -> Example:
        asked = f"<|im_start|>user\n{'<image>' * spec.num_tokens}\n{question}<|im_end|>\n<|im_start|>assistant\n"
        prompt, said = (built.tokenizer(text).input_ids for text in (asked, f"{reply}<|im_end|>"))
        return Example(prompt + said, [IGNORE_INDEX] * len(prompt) + said, (str(images / f"{image}.png"),))

    return [[example(image, question, reply) for reply in replies] for image, question, replies, _ in ASKED]


def lay_out_records(
    built: Assembled, objective: Any, examples: list[list[Example]], collate: Collator, start: dict[str, Tensor]
) -> Batch:
    """Two rows of pairs or of judged replies, with what the reference says of them."""
    if objective.kind == "kto":
        first, second, third = ([replace(good, is_good=True), replace(bad, is_good=False)] for good, bad, _ in examples)
    else:
        first, second, third = ([replace(good, rejected=bad)] for good, bad, _ in examples)
    rows, scores = [first + second, third], ReplyScores()
    built.model.load_state_dict(start)
    with torch.no_grad():
        LossModule(built.model, scores)(collate(rows))
    known = iter(scores.found[0].tolist())
    return collate([[replace(one, reference=tuple(islice(known, len(one.branches)))) for one in row] for row in rows])


def lay_out_rollouts(
    built: Assembled, objective: Any, examples: list[list[Example]], collate: Collator,
    start: dict[str, Tensor], old: dict[str, Tensor],
) -> Batch:  # fmt: skip
    """Two rows of replies that the model `old` wrote, the second group in both."""
    optimizer = torch.optim.SGD([p for p in built.model.parameters() if p.requires_grad])
    module = LossModule(built.model, objective.build())
    engine = LocalEngine(module, optimizer, device=torch.device("cpu"), max_grad_norm=None)
    make_rows = RowMaker(Collator(None, 0, 1), 108, shares=built.model.lets_records_share, packs=True)
    rollouts = Rollouts(
        objective, engine, seed=0, tokenizer=SimpleNamespace(), make_rows=make_rows, start=None,  # type: ignore[arg-type]
        rewards={}, show=print,
    )  # fmt: skip
    source = collate([[replace(replies[0], answer="") for replies in examples]])
    groups = [
        Group(prompt, [one.input_ids[-one.num_supervised :] for one in replies], objective.worth(rewards))
        for prompt, replies, (*_, rewards) in zip(source.prompts, examples, ASKED, strict=True)
    ]
    batch = make_rows(groups, source, None)
    built.model.load_state_dict(start)
    batch = with_scores(batch, reference=rollouts._scores([batch])[0])
    built.model.load_state_dict(old)
    if objective.kind == "ppo":
        return rollouts._valued([batch], objective)[0][0]
    return with_scores(batch, old=rollouts._scores([batch])[0])


def read_alone(plain: PlainModel, examples: list[list[Example]], models: Sequence[Any], temperature: float) -> Groups:
    """The replies to each question as the reference, the model that wrote them and the policy see them; only the
    policy has a graph."""
    said: list[list[list[Said]]] = []
    for weights in models:
        plain.load_state_dict(weights)
        with torch.set_grad_enabled(weights is models[-1]):
            said.append([[plain(one, temperature) for one in replies] for replies in examples])
    rewards = [rewards for *_, rewards in ASKED]
    return [[Reply(*each) for each in zip(*group, strict=True)] for group in zip(rewards, *said, strict=True)]


@pytest.mark.parametrize("kind", FORMULAS)
def test_loss_rewards_and_gradients_are_those_of_each_reply_alone(kind: str, tiny: Path):
    settings, formula = FORMULAS[kind]
    objective: Any = OBJECTIVES[kind](**settings)
    built = build(tiny, objective)
    model, plain = built.model, PlainModel(built, tiny / "llm").eval()
    start, old, policy = (add_noise(model, seed) for seed in range(3))
    examples = write_examples(built, tiny / "data/images")
    collate = Collator(
        built.image_spec, 0, 10**6, 160, image_token_id=built.image_token_id, shares_questions=model.lets_records_share
    )
    if objective.writes_replies:
        batch = lay_out_rollouts(built, objective, examples, collate, start, old)
    else:
        batch = lay_out_records(built, objective, examples, collate, start)
    assert (len(batch.input_ids), batch.num_images) == (2, 4 if objective.writes_replies else 3)

    trained = objective.build()
    model.load_state_dict(policy)
    loss, metrics = LossModule(model, trained)(batch)
    loss = loss / trained.normalizer(batch)
    loss.backward()
    temperature = settings.get("temperature", 1.0)
    expected, sums = formula(read_alone(plain, examples, (start, old, policy), temperature))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=5e-6)  # worst seen: 8e-7, dpo
    assert metrics[:2].tolist() == pytest.approx([value.item() for value in sums], abs=2e-5)  # 6e-6, ppo
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            gradient = plain.get_parameter(name).grad
            assert ((weight.grad - gradient).norm() / gradient.norm()).item() < 2e-5, name  # 4e-6, reward
