"""What is known of decoder families, by transformers' model type, and cannot be seen by looking at a model.

One record a family: whether packed records are kept apart by positions alone, what a pipeline cuts, what the head does
to logits, or why it is not taken. Where blocks, linear layers and cache are is looked up in the model:
`vlm.models.decoders`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
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
    leaves_out: bool = False
    """Whether a block is y = x + self_attn(input_layernorm(x)), then what looks at single tokens of y, so that the last
    one need not compute tokens that nothing reads (`vlm.models.last_block`)."""


@dataclass(frozen=True)
class BlockNames:
    """Last parts of the names of a block's linear layers and norms; the memory estimate counts what they keep."""

    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"  # of attention
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    head_norms: tuple[str, ...] = ("q_norm", "k_norm")  # of each head's query and key

    def roles(self) -> dict[str, str]:
        """Name of a linear layer -> which of these it is."""
        return {name: role for role, name in vars(self).items() if isinstance(name, str)}


@dataclass(frozen=True)
class HeadSettings:
    """Names in the config of what the model does to the output of its last matrix."""

    multiply: tuple[str, ...] = ("lm_head_multiplier", "logit_scale")  # Falcon-H1; Cohere
    divide: tuple[str, ...] = ("logits_scaling", "logits_mup_width_multiplier")  # Granite; Inkling
    # Gemma, RecurrentGemma, xLSTM
    cap: tuple[str, ...] = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    num_real: str = "unpadded_vocab_size"  # only the first so many are logits

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.multiply, *self.divide, *self.cap, self.num_real)


@dataclass(frozen=True)
class LLMFamily:
    """What is known of one of transformers' model types."""

    packs_by_positions: bool = False
    """Its attention keeps the records of a packed row apart by restarting position_ids, given no mask and no cache.
    Where it does not (a state that runs on, distances, positions read from the mask) each record is decoded alone."""
    needs_mask: bool = False
    """Its blocks compute with a mask of numbers, or attend in a way that the arguments of attention do not say, so that
    attention record by record (`vlm.models.varlen`) would be wrong."""
    parts: LLMParts | None = None
    """Of a decoder that is: embedding, rotary positions, blocks in a row, norm, head. Compare its model's `forward`
    with `block_inputs` below, and add it to tests/models/test_pipeline_layers.py."""
    block: BlockNames = BlockNames()
    head: HeadSettings = HeadSettings()
    generates: bool = True
    """transformers' generate() does as the same model without a cache."""
    uncalled: tuple[str, ...] = ()
    """Linear layers whose weight is read without calling them, so that an adapter would do nothing."""
    older_rope: tuple[tuple[str, str], ...] = ()
    """(name in rope_parameters, what transformers 4 calls it), where that is another name."""
    refused: str | None = None
    """Why it cannot be trained here."""


_FUSED = ("out_proj",)  # of Mamba's fused kernel; peft refuses an adapter there
_NEOX_ROPE = (("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct"))
# Types of which nothing else is to be said. Measured with transformers 5.24 by scripts/prove_decoders.py; see
# docs/models.md for the numbers.
_ALIKE = (
    (LLMFamily(packs_by_positions=True), """
    apertus apertus1p5_text arcee aria_text axk1 beam bitnet codegen cohere cohere2 cohere2_moe cohere_compass_text
    cwm dbrx deepseek_v2 deepseek_v3 diffllama dots1 emu3 ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe flex_olmo
    flint fuyu gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified_text glm glm4 glm4_moe
    glm4_moe_lite got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gptj granite granite_swa granitemoe granitemoe_swa
    granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 iquestcoder jais2 jetmoe kolibri1
    laguna longcat_flash mellum mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral ministral3 mixtral
    moss_transcribe_diarize nanochat nemotron olmo olmo2 olmo3 olmoe persimmon phi phi3 phi4_multimodal
    qwen2_moe qwen3_moe sarvam_mla sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma youtu
    """),
    (LLMFamily(packs_by_positions=True, needs_mask=True), """
    axk2 deepseek_v32 doge dory falcon glm_moe_dsa llama4 llama4_text phimoe
    """),
    (LLMFamily(), """
    afmoe bailing_hybrid bamba biogpt bloom ctrl gpt_oss granitemoehybrid inkling2_loop_text inkling2_text
    inkling_text jamba kimi_linear lara_mini lfm2 lfm2_moe lfm3 minimax olmo_hybrid openai-gpt opt qwen3_5
    qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma rwkv xglm zamba
    zamba2 zaya
    """),
    (LLMFamily(refused="it is an encoder, whose tokens see later ones"), """
    bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta
    roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod
    """),
    (LLMFamily(refused="it is half of an encoder-decoder, and nothing would feed its other half"), """
    bart bigbird_pegasus blenderbot blenderbot-small marian mbart musicgen musicgen_melody mvp pegasus plbart
    prophetnet trocr whisper
    """),
)  # fmt: skip
_REASONS = {
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
_SINGLE = {
    "falcon_h1": LLMFamily(uncalled=_FUSED),
    "falcon_mamba": LLMFamily(uncalled=_FUSED),
    "gpt_neox": LLMFamily(packs_by_positions=True, older_rope=_NEOX_ROPE),
    "gpt_neox_japanese": LLMFamily(packs_by_positions=True, older_rope=_NEOX_ROPE),
    "hyperclovax": LLMFamily(
        packs_by_positions=True,
        head=HeadSettings(multiply=(*HeadSettings.multiply, "logits_scaling"), divide=HeadSettings.divide[1:]),
    ),
    "internlm3": LLMFamily(packs_by_positions=True, parts=LLMParts(leaves_out=True)),
    "llama": LLMFamily(packs_by_positions=True, parts=LLMParts(leaves_out=True)),  # SmolLM2 too
    "mamba": LLMFamily(uncalled=_FUSED),
    "mamba2": LLMFamily(uncalled=_FUSED),
    "mistral": LLMFamily(packs_by_positions=True, parts=LLMParts(window="every block", leaves_out=True)),
    "mpt": LLMFamily(head=HeadSettings(multiply=("lm_head_multiplier",))),  # its logit_scale scales attention
    "nemotron_h": LLMFamily(uncalled=_FUSED),
    "qwen2": LLMFamily(packs_by_positions=True, parts=LLMParts(window="layer_types", leaves_out=True)),  # Qwen2.5 too
    "qwen3": LLMFamily(packs_by_positions=True, parts=LLMParts(window="layer_types", leaves_out=True)),
    "xlstm": LLMFamily(generates=False),
}

# by transformers' model type
FAMILIES: dict[str, LLMFamily] = (
    {name: family for family, names in _ALIKE for name in names.split()}
    | {name: LLMFamily(refused=reason) for name, reason in _REASONS.items()}
    | _SINGLE
)
_UNKNOWN = LLMFamily(generates=False)  # safe for every causal decoder


def family_of(config: Any) -> LLMFamily:
    """By a transformers config; of a type that nothing is known of, what is safe."""
    return FAMILIES.get(config.model_type, _UNKNOWN)


def refuse_decoder(settings: Mapping[str, Any], where: str) -> None:
    """
    Args:
        settings: config.json.
        where: of which folder or name, for the message.

    Raises:
        ConfigError: a model of this type would be trained wrongly.
    """
    kind = settings.get("model_type")
    reason = FAMILIES.get(str(kind), _UNKNOWN).refused
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
    family = family_of(config)
    if not family.packs_by_positions or getattr(config, "alibi", False):
        return Packing(False, is_known=config.model_type in FAMILIES)
    return Packing(True, by_varlen=not family.needs_mask, longest=_length_that_changes_rope(config))


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
    """From the settings of the config that its family names. `find_logits_rule` compares."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    head = family_of(text).head

    def values(names: Iterable[str]) -> list[Any]:
        return [value for name in names if (value := getattr(text, name, None))]

    return LogitsRule(
        factor=math.prod(values(head.multiply), start=1.0),
        divisor=math.prod(values(head.divide), start=1.0),
        cap=next(iter(values(head.cap)), None),
        num_real=getattr(text, head.num_real, None),
    )


def head_settings(config: Any) -> list[str]:
    """Names of the settings by which its head does more than one matrix."""
    return [name for name in family_of(config).head.names if getattr(config, name, None)]


def llm_parts(config: Any) -> LLMParts:
    """The parts of a language model, by its transformers config.

    Raises:
        ConfigError: the family is not known here.
    """
    parts = family_of(config).parts
    if parts is None:
        known = sorted(name for name, family in FAMILIES.items() if family.parts is not None)
        raise ConfigError(
            f"pipeline: model type {config.model_type} cannot be cut into stages; known: "
            f"{', '.join(known)}. Set engine.kind to zero or fsdp, or, if its decoder is built like Llama's, give it "
            "`parts` in FAMILIES of vlm/models/families.py"
        )
    return parts


def has_llm_parts(path: str) -> bool:
    """Whether the parts of the language model in this folder, or of this name, are known."""
    from transformers import PretrainedConfig

    try:
        kind = PretrainedConfig.get_config_dict(path)[0].get("model_type")
        return FAMILIES.get(str(kind), _UNKNOWN).parts is not None
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
