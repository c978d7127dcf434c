"""A family of language models that only this test knows, with blocks and a head of its own: from build to serve."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from launched import advance, launch, make
from torch import nn
from walk import walk

from vlm.compat import prepare
from vlm.config import load_config
from vlm.config_checks import config_problems
from vlm.generation.slot_cache import BatchedDecoder, build_decoder
from vlm.models.families import FAMILIES, BlockNames, HeadSettings, LLMFamily, LLMParts, LogitsRule
from vlm.plan.estimate import estimate

prepare()

from transformers import (  # noqa: E402 - after prepare
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

TYPE = "quiet"
FAMILY = LLMFamily(
    packs_by_positions=True,
    parts=LLMParts(),
    block=BlockNames(gate="w1", up="w3", down="w2"),
    head=HeadSettings(divide=("output_divisor",)),
)


class QuietConfig(LlamaConfig):
    model_type = TYPE
    output_divisor: float = 4.0


class QuietMLP(nn.Module):
    """Half of what Llama's adds, under other names."""

    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, intermediate, bias=False)
        self.w2 = nn.Linear(intermediate, width, bias=False)
        self.w3 = nn.Linear(width, intermediate, bias=False)

    def forward(self, hidden_states):
        return 0.5 * self.w2(nn.functional.silu(self.w1(hidden_states)) * self.w3(hidden_states))


class QuietModel(LlamaModel):
    config_class = QuietConfig

    def __init__(self, config):
        super().__init__(config)
        for block in self.layers:
            block.mlp = QuietMLP(config.hidden_size, config.intermediate_size)
        self.post_init()


class QuietForCausalLM(LlamaForCausalLM):
    config_class = QuietConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = QuietModel(config)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **arguments):
        output = super().forward(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **arguments)
        output.logits = output.logits / self.config.output_divisor
        return output


@contextmanager
def known():
    """Its classes at transformers, its record in the dict."""
    FAMILIES[TYPE] = FAMILY
    AutoConfig.register(TYPE, QuietConfig)
    AutoModelForCausalLM.register(QuietConfig, QuietForCausalLM)
    try:
        yield
    finally:
        del FAMILIES[TYPE], CONFIG_MAPPING._extra_content[TYPE], MODEL_FOR_CAUSAL_LM_MAPPING._extra_content[QuietConfig]


@pytest.fixture
def config(config_file, tiny, tmp_path):
    """Trains four steps with a tiny model of the family, and saves after two."""
    folder = tmp_path / "llm"
    shutil.copytree(tiny / "llm", folder)
    llama = json.loads((folder / "config.json").read_text())
    sizes = {key: value for key, value in llama.items() if key not in ("model_type", "architectures")}
    with known():
        torch.manual_seed(0)
        QuietForCausalLM(QuietConfig(**sizes)).save_pretrained(folder)
        yield config_file(
            model__llm={"path": str(folder)}, model__lora__dropout=0.0, train__max_steps=4, train__save_every=2
        )


def test_it_is_checked_and_planned_as_the_llama_that_it_is_in_all_but_names(config, config_file, tiny):
    quiet = load_config(config)
    assert config_problems(quiet) == []
    llama = load_config(config_file("llama.yaml", model__llm={"path": str(tiny / "llm")}, model__lora__dropout=0.0))
    found, expected = estimate(quiet), estimate(llama)
    assert [linear.role for linear in found.shape.llm.linears][-3:] == ["gate", "down", "up"]
    assert found.devices == expected.devices


@pytest.mark.slow
def test_it_needs_nothing_but_its_record(config, tiny, capsys):
    walked = walk(config, tiny / "data/images/red-circle-0.png", capsys)
    assert isinstance(walked.loaded.model.llm, QuietForCausalLM)
    assert walked.loaded.model.logits_rule == LogitsRule(divisor=4.0)
    assert isinstance(build_decoder(walked.loaded.model), BatchedDecoder)
    assert "its language model's head is scaled (output_divisor)" in (walked.full / "README.md").read_text()


def pipeline_steps(path: str) -> None:
    with known():
        run = make(path, ["engine.kind=pipeline", "engine.num_stages=2"])
        losses = [output.loss for output in advance(run, 0, 2)]
        Path(f"{path}.losses").write_text(json.dumps(losses))


@pytest.mark.slow
def test_it_trains_in_a_pipeline_as_in_one_process(config):
    expected = [output.loss for output in advance(make(str(config), []), 0, 2)]
    launch(pipeline_steps, str(config))
    assert json.loads(Path(f"{config}.losses").read_text()) == pytest.approx(expected, rel=1e-5)
