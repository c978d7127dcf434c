"""scripts/prove_decoders.py on a sample: one type at least of each way in which decoders differ."""

from __future__ import annotations

import json

import pytest
import torch
from prove_decoders import Measured, as_json, as_markdown, measure
from toy_decoders import toy_decoder

from vlm.models.vlm import VisionLanguageModel

SAMPLE = {
    "llama": "varlen",  # all rows of `vlm serve` in one forward
    "gemma2": "positions",  # a soft cap, windows
    "cohere": "varlen",  # a scale
    "gpt2": "varlen",  # learned positions, Conv1D
    "qwen3_next": "one by one",  # linear attention
    "mamba": "one by one",  # a state and a convolution
    "falcon_h1": "one by one",  # takes seq_idx, which a CPU does not honour; a multiplier of the head
    "bloom": "one by one",  # ALiBi
    "opt": "one by one",  # positions from the mask
    "rwkv": "one by one",
    "phimoe": "positions",  # its windows stand in the mask alone
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_type_is_right_in_every_column(model_type: str):
    row = measure(model_type)
    assert (row.state, row.reason) == ("right", "")
    assert row.packing == SAMPLE[model_type]
    assert row.logits < 1e-4
    assert row.gradient < 1e-4
    assert row.reply == "same"
    assert row.serve.startswith("same")
    assert int(row.lora.split(",")[0]) > 0


def test_what_cannot_be_right_is_refused_and_what_cannot_be_built_is_listed():
    assert measure("bert").state == "refused"
    assert measure("no_such_type").state == "not built"


def test_the_table_counts_what_it_lists():
    rows = [
        Measured("a", "right", packing="varlen"), Measured("b", "right", packing="one by one"),
        Measured("c", "refused", "it is an encoder"), Measured("d", "wrong", "leaks"),
    ]  # fmt: skip
    text = as_markdown(rows, 3.0)
    assert "**2 types are right, 1 of them with records decoded one by one; 1 leak in silence; 1 are" in text
    assert "| `c` | it is an encoder |" in text
    assert "| `d` | leaks |" in text


def test_what_is_kept_has_a_digit_and_a_zero_where_it_was_measured():
    kept = json.loads(as_json([Measured("a", "right", logits=4.26e-7), Measured("b", "refused", "it is an encoder")]))
    assert kept == [
        {"type": "a", "state": "right", "logits": 4e-7, "gradient": 0.0},
        {"type": "b", "state": "refused", "reason": "it is an encoder"},
    ]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba", "falcon_h1", "rwkv"])
def test_two_steps_of_training_are_the_same_packed_and_alone_without_cuda_kernels(model_type: str):
    """Losses of both steps, and the gradient of the second, which both runs reach with weights of their own."""
    ids = torch.randint(3, 60, (1, 20), generator=torch.manual_seed(0))
    parts = [(ids[:, :9], torch.arange(9)[None]), (ids[:, 9:], torch.arange(11)[None])]
    packed = [(ids, torch.cat([torch.arange(9), torch.arange(11)])[None])]

    def train(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[list[float], dict[str, torch.Tensor]]:
        model = VisionLanguageModel(toy_decoder(model_type)).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        losses, gradients = [], {}
        for _ in range(2):
            optimizer.zero_grad()
            loss = torch.stack([model.logits(model(*batch)).log_softmax(-1)[..., 7].sum() for batch in batches]).sum()
            loss.backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            optimizer.step()
            losses.append(loss.item())
        return losses, gradients

    (losses, gradients), (expected_losses, expected) = train(packed), train(parts)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert losses[0] != losses[1]
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert max((gradients[name] - expected[name]).abs().max() for name in expected) < 1e-4 * largest
