"""What is known of decoder families, by transformers' model type, and cannot be seen by looking at a model.

Which keep packed records apart by positions alone, which are not taken, what the head does to logits, and what a
pipeline cuts. Where blocks, linear layers and cache are is looked up in the model: `vlm.models.decoders`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from vlm.compat import cache_argument
from vlm.errors import ConfigError

# Types whose attention keeps the records of a packed row apart by restarting position_ids, given no mask and no cache.
# Measured with transformers 5.24 by scripts/prove_decoders.py; docs/models.md has the numbers.
PACKS_BY_POSITIONS = frozenset(
    """
    apertus apertus1p5_text arcee aria_text axk1 axk2 beam bitnet codegen cohere cohere2 cohere2_moe
    cohere_compass_text cwm dbrx deepseek_v2 deepseek_v3 deepseek_v32 diffllama doge dory dots1 emu3 ernie4_5
    ernie4_5_moe exaone exaone4 exaone_moe falcon flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text
    gemma3n_text gemma4 gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite
    glm_moe_dsa got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gptj granite granite_swa
    granitemoe granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4
    hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna llama llama4 llama4_text longcat_flash mellum
    mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral
    moss_transcribe_diarize nanochat nemotron olmo olmo2 olmo3 olmoe persimmon phi phi3 phi4_multimodal phimoe
    qwen2 qwen2_moe qwen3 qwen3_moe sarvam_mla sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2
    vaultgemma youtu
    """.split()  # noqa: SIM905 - a list of names is read in columns
)

# Of those, types whose blocks need a mask of numbers or attend in a way that the arguments of attention do not say.
NEEDS_MASK = frozenset({"axk2", "deepseek_v32", "doge", "dory", "falcon", "glm_moe_dsa", "llama4", "llama4_text"})

# Types in which a record of a packed row would see another one, by a state that runs on, by distances or by positions
# read from the mask, and which are right record by record.
ONE_BY_ONE = frozenset(
    """
    afmoe bailing_hybrid bamba biogpt bloom ctrl falcon_h1 falcon_mamba gpt_oss granitemoehybrid
    inkling2_loop_text inkling2_text inkling_text jamba kimi_linear lara_mini lfm2 lfm2_moe lfm3 mamba mamba2
    minimax mpt nemotron_h olmo_hybrid openai-gpt opt qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text
    qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma rwkv xglm xlstm zamba zamba2 zaya
    """.split()  # noqa: SIM905 - a list of names is read in columns
)

# transformers' generate() fails or differs from the same model without a cache.
GENERATES_WRONGLY = frozenset({"xlstm"})

_ENCODERS = """
    bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta
    roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod
"""
_DECODER_HALVES = """
    bart bigbird_pegasus blenderbot blenderbot-small marian mbart musicgen musicgen_melody mvp pegasus plbart
    prophetnet trocr whisper
"""
REFUSED = {
    **dict.fromkeys(_ENCODERS.split(), "it is an encoder, whose tokens see later ones"),
    **dict.fromkeys(_DECODER_HALVES.split(), "it is half of an encoder-decoder, and nothing would feed its other half"),
    "blt": "it reads bytes in patches, not tokens",
    "cpmant": "it takes token ids only, so images cannot be put in",
    "deepseek_v4": "its experts are chosen by token id, which images do not have",
    "gemma4_assistant": "it drafts for another model and cannot run alone",
    "gemma4_unified_assistant": "it drafts for another model and cannot run alone",
    "git": "it is a captioning model with an image encoder of its own",
    "mllama": "its images come in by cross-attention",
    "modernbert-decoder": "its head is more than one matrix",
    "moshi": "it speaks: text is only one of its streams",
    "reformer": "it runs on rows of fixed lengths only",
}


def refuse_decoder(settings: Mapping[str, Any], where: str) -> None:
    """
    Args:
        settings: config.json.
        where: of which folder or name, for the message.

    Raises:
        ConfigError: a model of this type would be trained wrongly.
    """
    kind = settings.get("model_type")
    reason = REFUSED.get(str(kind))
    text = settings.get("text_config") or settings
    if reason is None and isinstance(text, Mapping) and text.get("hidden_size_per_layer_input"):
        reason = "it looks embeddings up by token id in every block, and images have none"
    if reason is not None:
        raise ConfigError(
            f"model.llm.path {where}: model type {kind} cannot be trained here: {reason}. docs/models.md lists the "
            "types that can"
        )


@dataclass(frozen=True)
class Packing:
    """How records of one row are kept apart."""

    by_positions: bool  # else record by record
    by_varlen: bool = False  # also by attention that is told where records end (vlm.models.varlen)
    longest: int | None = None  # by_positions only in rows without a longer record: its length changes all rotations
    is_known: bool = True


def packing_of(config: Any) -> Packing:
    """Found by the model type and those settings of its config that change what positions do.

    >>> from types import SimpleNamespace
    >>> packing_of(SimpleNamespace(model_type="falcon", alibi=True)).by_positions
    False
    """
    kind = config.model_type
    if kind not in PACKS_BY_POSITIONS or getattr(config, "alibi", False):
        return Packing(False, is_known=kind in ONE_BY_ONE | PACKS_BY_POSITIONS)
    return Packing(True, by_varlen=kind not in NEEDS_MASK, longest=_length_that_changes_rope(config))


def _length_that_changes_rope(config: Any) -> int | None:
    """Tokens up to which rotations do not depend on a row's length; None if they never do."""
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if part.get("rope_type") in LENGTH_DEPENDENT_ROPE:
            return int(part.get("original_max_position_embeddings") or config.max_position_embeddings)
    return None


LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


def describe_packing(config: Any) -> str | None:
    """What a run says at its start where packing costs time; None where it does not."""
    packing = packing_of(config)
    if packing.by_positions:
        return None
    reason = "would see each other in a packed row" if packing.is_known else "might see each other in a packed row"
    unknown = "" if packing.is_known else " (vlm does not know this type: see docs/models.md)"
    return f"model type {config.model_type}: records {reason}, so each is decoded by itself, which is slower{unknown}"


@dataclass(frozen=True)
class LogitsRule:
    """What a model does to the output of its last matrix, in this order."""

    factor: float = 1.0
    divisor: float = 1.0
    cap: float | None = None  # tanh(logits / cap) * cap
    num_real: int | None = None  # only the first so many are logits


def logits_rule(config: Any) -> LogitsRule:
    """From settings of the config, and by type where one setting means several things. `find_logits_rule` compares."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    kind = text.model_type
    scaling = getattr(text, "logits_scaling", None) or 1.0  # Granite divides
    factors = [getattr(text, "lm_head_multiplier", None)]  # Falcon-H1
    if kind != "mpt":  # there it scales attention
        factors.append(getattr(text, "logit_scale", None))  # Cohere
    divisors = [scaling if kind != "hyperclovax" else 1.0, getattr(text, "logits_mup_width_multiplier", None)]
    factor = math.prod(value for value in factors if value) * (scaling if kind == "hyperclovax" else 1.0)
    caps = (getattr(text, name, None) for name in _CAPS)
    return LogitsRule(
        factor=factor,
        divisor=math.prod(value for value in divisors if value),
        cap=next((cap for cap in caps if cap), None),
        num_real=getattr(text, "unpadded_vocab_size", None),
    )


_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM


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
            "Llama's, add it to LLM_PARTS in vlm/models/families.py"
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


def block_inputs(
    llm: Any, windowed: Collection[bool], hidden_states: Tensor, position_ids: Tensor, layout: Tensor | None = None
) -> BlockInputs:
    """Masks and rotary embeddings as the model's own forward makes them of packed rows.

    Packing is read from restarting positions, which transformers does only without an attention mask and a cache.

    Args:
        windowed: `has_window` of the stage's blocks; only masks that one of them uses are made.
        hidden_states: [B, L, D], entering the stage; dtype and device are taken from it.
        position_ids: int64 [B, L].
        layout: int64 [1, 1, S, 3], where records end, of varlen attention, which needs no masks.
    """
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    arguments: dict[str, Any] = {
        "config": llm.config,
        "inputs_embeds": hidden_states,
        "attention_mask": layout,
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
