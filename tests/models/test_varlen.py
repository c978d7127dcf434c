"""Attention record by record is equal to masks in numbers, where records share their beginning too."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import write_llm
from torch import Tensor

from vlm.errors import ConfigError
from vlm.models import varlen
from vlm.models.config import LLMConfig
from vlm.models.llm import enable_gradient_checkpointing, load_llm
from vlm.models.varlen import encode_layout, lay_end_to_end, varlen_attention
from vlm.models.vlm import VisionLanguageModel

WORST = 1e-5  # hidden states are about 1; worst seen 2.4e-6
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {"sliding_window": 4}),
    (
        "qwen2",
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4, "use_sliding_window": True},
    ),
    ("qwen3", {}),
]


def model_of(tmp_path: Path, family: str, attention: str, **settings: Any) -> VisionLanguageModel:
    llm = load_llm(
        LLMConfig(path=str(write_llm(tmp_path / family, family, **settings)), attention=attention), torch.float32
    )
    return VisionLanguageModel(llm).train()


def positions(*runs: tuple[int, int]) -> list[int]:
    """Of runs (first position, length)."""
    return [first + i for first, length in runs for i in range(length)]


def losses_and_gradients(model: VisionLanguageModel, ids: Tensor, places: Tensor, real: Tensor) -> tuple[Tensor, Any]:
    model.zero_grad()
    hidden = model(ids, places)[real]
    hidden.tanh().square().sum().backward()
    return hidden.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative to the largest value of any gradient."""
    scale = max(float(grad.abs().max()) for grad in expected.values())
    return max(float((found[name] - expected[name]).abs().max()) for name in expected) / scale


@pytest.mark.parametrize(("family", "settings"), FAMILIES)
def test_states_and_gradients_are_those_of_masks(tmp_path: Path, family: str, settings: dict[str, Any]):
    places = torch.tensor([positions((0, 7), (0, 5), (0, 1), (0, 1), (0, 1)), positions((0, 15))])
    real = torch.ones(2, 15, dtype=torch.bool)
    real[0, 13:] = False  # padding: what stands there differs, and nothing reads it
    torch.manual_seed(0)
    ids = torch.randint(2, 28, (2, 15))
    by_mask = losses_and_gradients(model_of(tmp_path / "a", family, "sdpa", **settings), ids, places, real)
    by_record = losses_and_gradients(model_of(tmp_path / "b", family, "auto", **settings), ids, places, real)
    assert (by_mask[0] - by_record[0]).abs().max() < WORST
    assert largest(by_record[1], by_mask[1]) < WORST


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize(("family", "settings"), FAMILIES)
def test_records_that_share_their_beginning_are_what_each_is_alone(
    tmp_path: Path, family: str, settings: dict[str, Any], one_by_one: bool, monkeypatch: pytest.MonkeyPatch
):
    """Row 0: a record of 3, then one of 5 + 4 whose first 5 tokens two more begin with, then another record."""
    model = model_of(tmp_path, family, "auto", **settings)
    if one_by_one:
        monkeypatch.setattr(model, "packing", model.packing.__class__(by_positions=False))
    places = torch.tensor([positions((0, 3), (0, 9), (5, 2), (5, 6), (0, 4))])
    torch.manual_seed(0)
    ids = torch.randint(2, 28, (1, 24))
    shared, found = losses_and_gradients(model, ids, places, torch.ones(1, 24, dtype=torch.bool))
    row = ids[0]
    records = [row[:3], row[3:12], torch.cat([row[3:8], row[12:14]]), torch.cat([row[3:8], row[14:20]]), row[20:]]
    model.zero_grad()
    alone = [model(record[None], torch.arange(len(record))[None])[0] for record in records]
    hidden = torch.cat([alone[0], alone[1], alone[2][5:], alone[3][5:], alone[4]])
    hidden.tanh().square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert (shared - hidden).abs().max() < WORST
    assert largest(found, expected) < WORST


def test_blocks_that_are_computed_again_attend_alike(tmp_path: Path):
    places, ids = torch.tensor([positions((0, 6), (2, 3), (0, 3))]), torch.arange(2, 14)[None]
    results = []
    for again in (False, True):
        model = model_of(tmp_path / str(again), "llama", "varlen")
        if again:
            enable_gradient_checkpointing(model.llm)
        results.append(losses_and_gradients(model, ids, places, places >= 0))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


def test_padding_is_left_out_and_no_mask_of_the_row_is_made(tmp_path: Path):
    model = model_of(tmp_path, "llama", "auto")
    lengths = []
    model.llm.model.layers[0].register_forward_pre_hook(lambda _module, inputs: lengths.append(inputs[0].shape))
    model(torch.full((2, 10), 5), torch.tensor([positions((0, 6), *[(0, 1)] * 4), positions((0, 3), (0, 7))]))
    assert lengths == [(1, 17, 32)]  # of 20, three are padding; one of it stays
    assert lay_end_to_end(torch.tensor([[0, 1, 0, 1, 2, 1]])).layout.squeeze().tolist() == [
        [2, 0, 0],
        [3, 0, 0],
        [1, 1, 1],
    ]


def test_a_type_that_cannot_keeps_its_masks_and_says_so_when_asked(tmp_path: Path):
    path = write_llm(tmp_path / "llama")
    assert load_llm(LLMConfig(path=str(path)), torch.float32).config._attn_implementation == "varlen"
    assert load_llm(LLMConfig(path=str(path), attention="sdpa"), torch.float32).config._attn_implementation == "sdpa"
    gemma2 = write_llm(tmp_path / "gemma2", "gemma2")  # soft caps, which SDPA has not
    assert load_llm(LLMConfig(path=str(gemma2)), torch.float32).config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match=r"model\.llm\.attention varlen: model type gemma2"):
        load_llm(LLMConfig(path=str(gemma2), attention="varlen"), torch.float32)


def test_a_window_that_only_a_mask_says_is_refused_where_a_record_is_longer():
    module = torch.nn.Module()
    module.config = SimpleNamespace(model_type="toy", sliding_window=4)
    states = torch.randn(1, 2, 9, 8)

    def attend(*lengths: int, **told: Any) -> None:
        layout = torch.tensor([(length, 0, 0) for length in lengths]).view(1, 1, -1, 3)
        varlen_attention(module, states, states, states, layout, **told)

    attend(4, 4, 1)
    attend(5, 4, sliding_window=None)  # in this block it is told that there is none
    with pytest.raises(ConfigError, match="type toy: a record of 5 tokens, and its window of 4 is not told"):
        attend(5, 4)


def test_without_a_layout_it_is_sdpa():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 6, 8) for heads in (4, 2, 2))
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    out, _ = varlen_attention(module, query, key, value, None)
    whole, _ = varlen_attention(module, query, key, value, encode_layout(lay_segments((0, 6))))
    assert (out - whole).abs().max() < 1e-6
    empty = torch.zeros(1, 1, 6, 6)
    masked, _ = varlen_attention(module, query, key, value, empty)
    assert (masked[0, 0] - whole[0, 0]).abs().max() > 0.1  # the first token sees all


def lay_segments(*runs: tuple[int, int]) -> Any:
    return varlen.find_segments(torch.tensor([positions(*runs)]))


def dense_kernel(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, key_ends: Tensor, *_: int, **given: Any
) -> Tensor:
    """What torch documents of `varlen_attn`, by masks: the last query sees the last key."""
    left, _ = given["window_size"]
    out = []
    for (start, stop), (first, last) in zip(pairwise(ends.tolist()), pairwise(key_ends.tolist()), strict=True):
        length, seen = stop - start, last - first
        distance = torch.arange(seen - length, seen)[:, None] - torch.arange(seen)
        mask = (distance >= 0) & ((distance <= left) if left >= 0 else True)
        parts = (part.transpose(0, 1)[None] for part in (query[start:stop], key[first:last], value[first:last]))
        one = torch.nn.functional.scaled_dot_product_attention(
            *parts, attn_mask=mask, scale=given["scale"], enable_gqa=given["enable_gqa"]
        )
        out.append(one[0].transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_for_gpus_is_given_the_same_segments(monkeypatch: pytest.MonkeyPatch, window: int | None):
    """The kernel itself runs on a GPU only, where it is compared with SDPA once before it is used."""
    import torch.nn.attention.varlen as kernels

    monkeypatch.setattr(kernels, "varlen_attn", dense_kernel)
    segments = tuple(tuple(segment[1:]) for segment in lay_segments((0, 5), (2, 4), (2, 1), (0, 7)))
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 17, 8) for heads in (4, 2, 2))
    by_kernel = varlen._with_kernel(query, key, value, segments, None, window)
    assert (by_kernel - varlen._by_loop(query, key, value, segments, None, window)).abs().max() < 1e-6


def broken(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("no kernel image is available\nmore")


@pytest.mark.parametrize(
    ("kernel", "is_right"), [(dense_kernel, True), (broken, False), (lambda q, *_, **__: q, False)]
)
def test_a_kernel_that_fails_or_differs_is_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kernel: Callable[..., Tensor], is_right: bool
):
    import torch.nn.attention.varlen as kernels

    monkeypatch.setattr(kernels, "varlen_attn", kernel)
    for without_gradient in (nullcontext, torch.no_grad, torch.inference_mode):  # of the forward that asks first
        varlen._kernel_is_right.cache_clear()
        with without_gradient():
            assert varlen._kernel_is_right(torch.device("cpu"), torch.bfloat16, 8) == is_right
    varlen._kernel_is_right.cache_clear()
    assert ("torch's varlen kernel is not used" in capsys.readouterr().err) != is_right


def test_what_an_evaluation_saw_first_trains_as_well(tmp_path: Path):
    """Nothing that one forward keeps for the next may be a tensor of inference mode, which no backward can read."""
    model = model_of(tmp_path, "mistral", "auto", sliding_window=4)
    places, ids = torch.tensor([positions((0, 7), (3, 2))]), torch.arange(2, 11)[None]
    with torch.inference_mode():
        model(ids, places)
        varlen._lay.cache_clear()
        kept = varlen._lay(((5, 0, 0), (2, 0, 3)), torch.device("cpu"))
    assert not any(part.is_inference() for part in (kept.query_ends, kept.key_ends, kept.keys))
    model(ids, places).sum().backward()
