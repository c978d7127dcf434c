"""The last block leaves out what nothing reads, and gives the same to the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_llm

from vlm.batch import IGNORE_INDEX
from vlm.models.config import LLMConfig
from vlm.models.families import FAMILIES
from vlm.models.llm import enable_gradient_checkpointing, load_llm
from vlm.models.loss import chunked_cross_entropy, predicts_supervised
from vlm.models.vlm import VisionLanguageModel

CUT = sorted(name for name, family in FAMILIES.items() if family.parts is not None and family.parts.leaves_out)
IDS = torch.arange(2, 26).view(2, 12)
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 0, 0], [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]])
LABELS = torch.full((2, 12), IGNORE_INDEX)
for row, place in ((0, 5), (0, 6), (0, 7), (1, 2), (1, 11)):  # the second is predicted by the token at 2
    LABELS[row, place] = IDS[row, place]


def model_of(path: Path, family: str, attention: str = "auto") -> VisionLanguageModel:
    config = LLMConfig.model_validate({"path": str(write_llm(path, family)), "attention": attention})
    return VisionLanguageModel(load_llm(config, torch.float32)).train()


def loss_and_gradients(model: VisionLanguageModel, read: torch.Tensor | None) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    hidden = model(IDS, POSITIONS, read=read)
    loss = chunked_cross_entropy(hidden, LABELS, model.logits, position_ids=POSITIONS)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def fed_forward(model: VisionLanguageModel) -> list[int]:
    """Tokens that each block's feed-forward computes, written down as it runs."""
    counts: list[int] = []
    for block in model.llm.model.layers:
        block.mlp.register_forward_pre_hook(lambda _module, inputs: counts.append(inputs[0].shape[1]))
    return counts


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("family", CUT)
def test_loss_and_gradients_are_those_of_all_tokens(tmp_path: Path, family: str, again: bool):
    model = model_of(tmp_path, family)
    if again:
        enable_gradient_checkpointing(model.llm)
    expected = loss_and_gradients(model, None)
    counts = fed_forward(model)
    read = predicts_supervised(LABELS, POSITIONS)
    assert read.nonzero().tolist() == [[0, 2], [0, 4], [0, 6], [1, 1], [1, 10]]
    found = loss_and_gradients(model, read)
    assert counts[:2] == [23, 5]  # two blocks; of 24 tokens one is padding, five predict
    assert abs(found[0] - expected[0]) < 1e-6 * expected[0]
    assert found[1].keys() == expected[1].keys()
    scale = max(float(grad.abs().max()) for grad in expected[1].values())
    assert max(float((found[1][n] - g).abs().max()) for n, g in expected[1].items()) < 1e-5 * scale  # worst seen: 4e-7


def test_a_batch_that_learns_nothing_still_runs_through_all_weights(tmp_path: Path):
    model = model_of(tmp_path, "qwen2")
    counts = fed_forward(model)
    hidden = model(IDS, POSITIONS, read=torch.zeros(2, 12, dtype=torch.bool))
    (hidden.sum() * 0).backward()
    assert counts == [23, 1]
    assert all(p.grad is not None for name, p in model.named_parameters() if ".layers." in name)


def test_with_masks_every_token_is_computed(tmp_path: Path):
    model = model_of(tmp_path, "llama", "sdpa")
    counts = fed_forward(model)
    model(IDS, POSITIONS, read=predicts_supervised(LABELS, POSITIONS))
    assert counts == [12, 12]


def test_a_model_that_is_wrapped_twice_has_its_hooks_once(tmp_path: Path):
    model: Any = model_of(tmp_path, "llama")
    again = VisionLanguageModel(model.llm)
    block = again.llm.model.layers[-1]
    assert len(block._forward_pre_hooks) == len(block.self_attn._forward_hooks) == 1
