"""Where the parts of a decoder are that a pipeline cuts apart, per family of transformers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from vlm.compat import cache_argument
from vlm.errors import ConfigError


@dataclass(frozen=True)
class LLMParts:
    """Module names inside a `...ForCausalLM`, and which blocks attend within a sliding window only."""

    embed: str = "model.embed_tokens"
    blocks: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str = "model.rotary_emb"
    window: Literal["none", "every block", "layer_types"] = "none"
    """every block: where config.sliding_window is set. layer_types: in blocks that config.layer_types names so."""


# transformers' model types whose decoder is: embedding, rotary positions, blocks in a row, norm, head. To add one,
# compare its model's `forward` with `block_inputs` below, and add it to tests/models/test_pipeline_layers.py.
LLM_PARTS = {
    "internlm3": LLMParts(),
    "llama": LLMParts(),  # SmolLM2 too
    "mistral": LLMParts(window="every block"),
    "qwen2": LLMParts(window="layer_types"),  # Qwen2.5 too
    "qwen3": LLMParts(window="layer_types"),
}


def llm_parts(config: Any) -> LLMParts:
    """The parts of a language model, by its transformers config.

    Raises:
        ConfigError: the family is not known here.
    """
    parts = LLM_PARTS.get(config.model_type)
    if parts is None:
        raise ConfigError(
            f"pipeline: model type {config.model_type} cannot be cut into stages; known: "
            f"{', '.join(sorted(LLM_PARTS))}. Set engine.kind to zero or fsdp, or, if its decoder is built like "
            "Llama's, add it to LLM_PARTS in vlm/models/llm_parts.py"
        )
    return parts


def has_llm_parts(path: str) -> bool:
    """Whether the parts of the language model in this folder, or of this name, are known."""
    from transformers import PretrainedConfig

    try:
        return PretrainedConfig.get_config_dict(path)[0].get("model_type") in LLM_PARTS
    except (OSError, ValueError):  # building it will say what is wrong
        return False


@dataclass(frozen=True)
class BlockInputs:
    """What every block of a stage needs beside the hidden states."""

    position_ids: Tensor  # int64 [B, L]
    position_embeddings: tuple[Tensor, Tensor]  # cosine and sine, [B, L, head width]
    full_mask: Any  # as the attention implementation wants it; None where that needs none
    window_mask: Any


def block_inputs(llm: Any, windowed: Collection[bool], hidden_states: Tensor, position_ids: Tensor) -> BlockInputs:
    """Masks and rotary embeddings as the model's own forward makes them of packed rows.

    Packing is read from restarting positions, which transformers does only without an attention mask and a cache.

    Args:
        windowed: `has_window` of the stage's blocks; only masks that one of them uses are made.
        hidden_states: [B, L, D], entering the stage; dtype and device are taken from it.
        position_ids: int64 [B, L].
    """
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    arguments: dict[str, Any] = {
        "config": llm.config,
        "inputs_embeds": hidden_states,
        "attention_mask": None,
        cache_argument(create_causal_mask): None,
        "position_ids": position_ids,
    }
    return BlockInputs(
        position_ids,
        llm.get_submodule(llm_parts(llm.config).rotary)(hidden_states, position_ids=position_ids),
        create_causal_mask(**arguments) if False in windowed else None,
        create_sliding_window_causal_mask(**arguments) if True in windowed else None,
    )


def has_window(config: Any, block: int) -> bool:
    """Whether the block of this index attends within a sliding window only."""
    rule = llm_parts(config).window
    if rule == "every block":
        return config.sliding_window is not None
    return rule == "layer_types" and config.layer_types[block] == "sliding_attention"
