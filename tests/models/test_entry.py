"""Embeddings that a decoder multiplies only where it looks them up itself, and what images and words are given as."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_decoders import toy_decoder

from vlm.errors import ConfigError
from vlm.generation.batched import BatchedGenerator, Reply
from vlm.generation.generate import GenerationSettings, generate
from vlm.generation.sampling import SamplingSettings
from vlm.models.entry import embedding_scale, embedding_std, find_embedding_factor
from vlm.models.vlm import VisionLanguageModel

IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])


@pytest.mark.parametrize(
    ("kind", "changes", "factor", "scale"),
    [
        ("llama", {}, 1.0, 1.0),
        ("gpt2", {}, 1.0, 1.0),  # positions are added behind
        ("bloom", {}, 1.0, 1.0),  # a norm stands behind
        ("mamba", {}, 1.0, 1.0),
        ("granite", {"embedding_multiplier": 12.0}, 1.0, 1.0),  # multiplies what it is given too
        ("gemma2", {}, 1.0, 8.0),  # the embedding itself multiplies, by the root of 64
        ("falcon_h1", {"embedding_multiplier": 4.0}, 4.0, 4.0),
    ],
)
def test_the_factor_is_what_given_embeddings_lack(kind: str, changes: dict[str, Any], factor: float, scale: float):
    llm = toy_decoder(kind, **changes)
    assert find_embedding_factor(llm) == factor
    assert embedding_scale(llm) == pytest.approx(scale, rel=1e-3)
    assert embedding_std(llm) == pytest.approx(
        VisionLanguageModel(llm).embed(torch.arange(64)[None]).std().item(), rel=0.05
    )


def test_falcon_h1_computes_here_what_it_computes_from_ids():
    llm = toy_decoder("falcon_h1", embedding_multiplier=4.0)
    model = VisionLanguageModel(llm).eval()
    with torch.no_grad():
        expected = llm(input_ids=IDS, use_cache=False).logits
        got = model.logits(model(IDS, torch.arange(8)[None]))
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()  # worst seen: 2e-7


def test_falcon_h1_writes_the_same_in_chat_and_in_serve_as_without_a_cache():
    llm = toy_decoder("falcon_h1", embedding_multiplier=4.0)
    model, ids = VisionLanguageModel(llm).eval(), IDS[0].tolist()
    with torch.no_grad():
        for _ in range(5):
            ids.append(int(llm(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert generate(model, IDS[0].tolist(), None, [], GenerationSettings(max_new_tokens=5)) == ids[8:]
    writer = BatchedGenerator(model)
    reply = Reply(IDS[0].tolist(), None, 5, (), SamplingSettings(), lambda token: True, lambda reason: None)
    writer.add(reply)
    while writer.step():
        pass
    assert reply.new_ids == ids[8:]


def _shifted(decoder: Any, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **rest: Any) -> Any:
    """Adds one to what it looks up itself."""
    words = decoder.embed_tokens(input_ids) + 1 if inputs_embeds is None else inputs_embeds
    return type(decoder).forward(decoder, inputs_embeds=words, **rest)


def test_what_is_no_factor_is_refused_by_name():
    llm = toy_decoder("llama")
    llm.model.forward = MethodType(_shifted, llm.model)
    with pytest.raises(ConfigError, match="model type llama does something to embeddings that it looks up itself"):
        VisionLanguageModel(llm)
