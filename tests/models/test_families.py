"""What is known of decoder families, and what is found by looking at a model."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from meta_models import build_on_meta
from tiny_models import scramble, write_tokenizer
from torch import nn
from toy_decoders import toy_decoder

from vlm.errors import ConfigError
from vlm.generation.batched import BatchedGenerator, Reply
from vlm.generation.generate import GenerationSettings, generate
from vlm.generation.sampling import SamplingSettings
from vlm.models.build import build_model
from vlm.models.config import LoRAConfig, ModelConfig, QuantizationConfig
from vlm.models.decoders import find_blocks, find_linears
from vlm.models.families import (
    _ALIKE,
    _REASONS,
    _SINGLE,
    FAMILIES,
    LogitsRule,
    describe_packing,
    logits_rule,
    packing_of,
    refuse_decoder,
)
from vlm.models.head import find_logits_rule
from vlm.models.quantize import keep_packed_whole, pack_linears
from vlm.models.row_decoders import PlainDecoder, RowByRowDecoder, build_row_decoder
from vlm.models.trainable import merge_lora, set_trainable
from vlm.models.vlm import VisionLanguageModel


def positions(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


# the table


def test_a_type_has_one_record_only():
    names = [name for _, listed in _ALIKE for name in listed.split()] + [*_REASONS, *_SINGLE]
    assert len(names) == len(set(names)) == len(FAMILIES)


def test_positions_keep_records_apart_in_some_types_only_and_a_type_that_is_not_known_is_safe():
    def by_positions(model_type: str, **settings: object) -> bool:
        return packing_of(SimpleNamespace(model_type=model_type, **settings)).by_positions

    assert by_positions("llama")
    assert not by_positions("mamba")
    assert by_positions("falcon", alibi=False)
    assert not by_positions("falcon", alibi=True)
    assert not by_positions("of_next_year")


def test_a_run_says_that_records_are_decoded_one_by_one():
    assert describe_packing(SimpleNamespace(model_type="llama")) is None
    assert "mamba: records would see each other" in describe_packing(SimpleNamespace(model_type="mamba"))
    assert "does not know this type" in describe_packing(SimpleNamespace(model_type="of_next_year"))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "bert"}, "bert cannot be trained here: it is an encoder"),
        ({"model_type": "mbart"}, "half of an encoder-decoder"),
        ({"model_type": "gemma3n", "text_config": {"hidden_size_per_layer_input": 256}}, "by token id in every block"),
    ],
)
def test_a_type_that_would_be_wrong_is_refused_by_its_config_before_weights_are_read(tmp_path: Path, settings, reason):
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings))  # there are no weights
    config = ModelConfig.model_validate({"llm": {"path": str(tmp_path)}, "trainable": ["llm"]})
    for build in (build_model, build_on_meta):
        with pytest.raises(ConfigError, match=reason):
            build(config)


def test_gemma_4_without_embeddings_in_its_blocks_is_not_refused():
    refuse_decoder({"model_type": "gemma4_text", "hidden_size_per_layer_input": 0}, "there")


# the head


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("granite", {"logits_scaling": 4.0}, 0.25 * 8.0),
        ("hyperclovax", {"logits_scaling": 4.0}, 4.0 * 8.0),
        ("falcon_h1", {"lm_head_multiplier": 0.5}, 0.5 * 8.0),
        ("recurrent_gemma", {"logits_soft_cap": 2.0}, 2.0),  # tanh(4) * 2, almost
        ("mpt", {"logit_scale": 0.5}, 8.0),  # of attention, not of logits
    ],
)
def test_logits_are_scaled_and_capped_as_the_family_does(model_type: str, settings: dict, expected: float):
    rule = logits_rule(SimpleNamespace(model_type=model_type, **settings))
    logits = torch.tensor(8.0) * rule.factor / rule.divisor
    logits = logits if rule.cap is None else torch.tanh(logits / rule.cap) * rule.cap
    assert logits.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("model_type", ["hyperclovax", "xlstm", "minicpm3", "inkling_text"])
def test_a_head_that_is_known_passes_the_comparison_with_the_models_own_forward(model_type: str):
    changes = {"logits_scaling": 0.125} if model_type == "hyperclovax" else {}
    llm = toy_decoder(model_type, **changes)
    assert find_logits_rule(llm, "toy") == logits_rule(llm.config)


def test_a_head_that_is_not_known_is_refused_with_the_size_of_the_difference():
    llm = toy_decoder("llama")
    head = llm.lm_head
    llm.lm_head = nn.Sequential(head, nn.Tanh())
    llm.get_output_embeddings = lambda: head
    with pytest.raises(ConfigError, match=r"llama changes its logits after the last matrix.*they differ by"):
        find_logits_rule(llm, "toy")


class Halved(nn.Module):
    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits / 2


def test_the_models_own_forward_decides_and_not_what_its_config_says_or_leaves_out():
    llm = toy_decoder("llama")
    llm.config.logits_scaling = 8.0  # which Llama does not read
    assert find_logits_rule(llm) == LogitsRule()
    other = toy_decoder("llama")
    head = other.lm_head
    other.lm_head = nn.Sequential(head, Halved())
    other.get_output_embeddings = lambda: head
    assert find_logits_rule(other).factor == pytest.approx(0.5)


def test_a_cap_that_no_config_names_is_not_taken_for_nothing():
    llm = toy_decoder("gemma2", final_logit_softcapping=60.0)
    assert find_logits_rule(llm).cap == 60.0
    other = toy_decoder("gemma2", final_logit_softcapping=60.0)
    other.forward = partial(_capped, other, 60.0)
    other.config.final_logit_softcapping = None
    with pytest.raises(ConfigError, match="changes its logits"):
        find_logits_rule(other)


def _capped(llm, cap: float, **arguments):
    output = type(llm).forward(llm, **arguments)
    output.logits = torch.tanh(output.logits / cap) * cap
    return output


# packing


@pytest.mark.parametrize("model_type", ["mamba", "bloom", "opt", "lfm2", "gpt_oss"])
def test_a_record_in_a_packed_row_is_what_it_is_alone(model_type: str):
    llm = toy_decoder(model_type)
    model = VisionLanguageModel(llm)
    ids = torch.randint(3, 60, (1, 15), generator=torch.manual_seed(0))
    with torch.no_grad():
        packed = model.logits(model(ids, positions(6, 9)))
        alone = torch.cat([llm(input_ids=part, use_cache=False).logits for part in (ids[:, :6], ids[:, 6:])], 1)
        leaking = model.logits(model._decoder(model.embed(ids), positions(6, 9)))
    assert (packed - alone).abs().max() < 1e-4  # worst seen: 1e-5
    assert (leaking - alone).abs().max() > 0.1  # what transformers does with the row


def test_a_row_with_a_record_so_long_that_rotations_change_is_decoded_one_by_one():
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8,
        "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0,
    }  # fmt: skip
    llm = toy_decoder("phi3", rope_parameters=rope, original_max_position_embeddings=8)
    model = VisionLanguageModel(llm)
    assert model.packing.longest == 8
    ids = torch.randint(3, 60, (1, 18), generator=torch.manual_seed(0))
    with torch.no_grad():
        packed = model(ids, positions(6, 12))
        short = model(ids[:, :6], positions(6))
        leaking = model._decoder(model.embed(ids), positions(6, 12))
    assert (packed[:, :6] - short).abs().max() < 1e-5
    assert (leaking[:, :6] - short).abs().max() > 1e-2


# blocks and linear layers


@pytest.mark.parametrize(
    ("model_type", "block", "linears"),
    [
        ("llama", "model.layers.0", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gpt2", "transformer.h.0", {"c_attn", "c_proj", "c_fc"}),
        ("bloom", "transformer.h.0", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        ("opt", "model.decoder.layers.0", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
        ("mamba", "backbone.layers.0", {"in_proj", "x_proj"}),  # dt_proj and out_proj are read, not called
        ("gemma3", "model.language_model.layers.0", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                                                     "down_proj"}),
    ],
)  # fmt: skip
def test_blocks_and_their_linear_layers_are_found_whatever_they_are_called(model_type: str, block: str, linears: set):
    llm = toy_decoder(model_type)
    blocks = find_blocks(llm)
    assert len(blocks) == 4
    assert next(iter(blocks)) == block
    assert {name.rpartition(".")[2] for name in find_linears(llm)} == linears
    assert all(name.startswith(tuple(blocks)) for name in find_linears(llm))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_blocks_are_the_same_where_packed_weights_are_kept_out_of_the_parameters():
    """What is left of them may be less than small matrices that lie in lists too."""
    llm = toy_decoder("gemma3n_text", hidden_size=256, intermediate_size=512)
    before = list(find_blocks(llm))
    assert pack_linears(llm, QuantizationConfig(), torch.float32, torch.device("cpu"), "a test") > 0
    keep_packed_whole(llm)
    assert list(find_blocks(llm)) == before


def test_an_adapter_on_gpt2_is_merged_into_matrices_that_lie_the_other_way():
    model = VisionLanguageModel(toy_decoder("gpt2"))
    set_trainable(model, ["llm.lora"], LoRAConfig(rank=2))
    scramble(nn.ModuleList(m for name, m in model.named_modules() if "lora_B" in name))
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        before = model(ids, positions(10))
        merge_lora(model)
        assert (model(ids, positions(10)) - before).abs().max() < 1e-5
    assert len(find_linears(model.llm)) == 16


# cached replies


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [("gpt2", RowByRowDecoder), ("mamba", RowByRowDecoder), ("rwkv", RowByRowDecoder), ("openai-gpt", PlainDecoder)],
)
def test_a_reply_is_what_the_model_writes_without_a_cache_in_chat_and_in_serve(model_type: str, kind: type):
    llm = toy_decoder(model_type)
    model = VisionLanguageModel(llm).eval()
    prompt, plain = [5, 9, 33, 7, 21, 40, 8], [5, 9, 33, 7, 21, 40, 8]
    with torch.no_grad():
        for _ in range(6):
            plain.append(int(llm(input_ids=torch.tensor([plain]), use_cache=False).logits[0, -1].argmax()))
    assert generate(model, prompt, None, set(), GenerationSettings(max_new_tokens=6)) == plain[7:]
    server = BatchedGenerator(model, max_tokens=256, prefill_tokens=3)  # the prompt in three pieces
    assert isinstance(server.decoder, kind)
    reply = Reply(prompt, None, 6, set(), SamplingSettings(), lambda _: True, lambda _: None)
    server.add(reply)
    while server.step():
        pass
    assert reply.new_ids == plain[7:]


def test_mamba_reads_a_prompt_in_pieces_token_by_token_and_rwkv_hands_its_own_state_on():
    assert build_row_decoder(VisionLanguageModel(toy_decoder("mamba")).eval())._use.one_by_one
    assert build_row_decoder(VisionLanguageModel(toy_decoder("rwkv")).eval())._use.makes_own


def test_beams_are_refused_where_transformers_takes_no_embeddings():
    model = VisionLanguageModel(toy_decoder("openai-gpt")).eval()
    with pytest.raises(ConfigError, match="num_beams 2: model type openai-gpt"):
        generate(model, [5, 9], None, set(), GenerationSettings(max_new_tokens=2, num_beams=2))
