"""Models of real shapes without their weights."""

from __future__ import annotations

import torch

from vlm.models.build import assemble
from vlm.models.config import ModelConfig
from vlm.models.llm import llm_from_config, pad_vocabulary
from vlm.models.vision import build_vision
from vlm.models.vlm import VisionLanguageModel


def build_on_meta(config: ModelConfig) -> VisionLanguageModel:
    """The model's shapes without its weights: config files are read, nothing is loaded or computed."""
    with torch.device("meta"):
        llm = llm_from_config(config.llm, trust_remote_code=config.trust_remote_code)
        if config.llm.pad_vocab_to_multiple_of:
            pad_vocabulary(llm, llm.config.vocab_size, config.llm.pad_vocab_to_multiple_of)
        vision = None if config.vision is None else build_vision(config.vision, torch.bfloat16, weights=False)
        return assemble(config, llm, vision, None)[0]
