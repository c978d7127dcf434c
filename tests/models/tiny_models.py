"""Tiny models with random weights, in the folders that real ones come in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vlm.compat import prepare
from vlm.models.config import ModelConfig

prepare()

WORDS = ["<|end|>", "<|pad|>", *"abcdefghijklmnopqrstuvwxyz"]  # ids 0 and 1 are special


def write_tokenizer(folder: Path, *, pad: bool = True) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="z"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"eos_token": "<|end|>"} | ({"pad_token": "<|pad|>"} if pad else {})
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def write_llm(folder: Path, family: str = "llama", *, vocab_size: int = 28, **changes: Any) -> Path:
    """Two layers, width 32, 4 heads and 2 for keys and values. Families are transformers' model types."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings | changes)).save_pretrained(folder)
    return folder


def write_vision(folder: Path, kind: str = "clip_vision_model", **changes: Any) -> Path:
    """A vision tower of transformers with 3 blocks: 28 x 28 pixels, 16 patches, width 24."""
    from transformers import AutoConfig, AutoModel

    settings: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
    }
    torch.manual_seed(1)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **settings | changes))
    scramble(model)
    model.save_pretrained(folder)
    return folder


def write_timm(folder: Path, architecture: str, model: torch.nn.Module) -> Path:
    """timm's folder layout: config.json and model.safetensors."""
    folder.mkdir(parents=True)
    settings = {key: model.pretrained_cfg[key] for key in ("input_size", "mean", "std", "first_conv", "classifier")}
    record = {"architecture": architecture, "num_classes": 1000, "pretrained_cfg": settings | {"num_classes": 1000}}
    (folder / "config.json").write_text(json.dumps(record))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def scramble(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights that make every part matter: norms and biases too are away from 1 and 0."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def changed(config: ModelConfig, **changes: Any) -> ModelConfig:
    """The config with other values, validated again."""
    return ModelConfig.model_validate(config.model_dump() | changes)
