"""Decoders that were published with Python code of their own, and the class of transformers that computes the same.

One record a family: the settings and the weights of the native class that follow from the old ones. The old layer is
written out once more, from its published description, in tests/models/test_legacy.py, and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm.models.weight_adapter import Rule, WeightAdapter, drop, rename, split

Settings = Mapping[str, Any]  # of config.json
_QKV = tuple(f"model.layers.{{n}}.self_attn.{name}_proj.{{leaf}}" for name in "qkv")
_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "initializer_range",
    "hidden_act", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class LegacyFamily:
    """One model type that transformers has no class for."""

    title: str
    """What people call it."""
    becomes: str
    """transformers' model type."""
    settings: Callable[[Settings], dict[str, Any]]
    """The native class's settings, of the old config.json."""
    adapter: Callable[[Settings], WeightAdapter]
    """Ours are the native class's names, theirs the old ones."""
    why_not: Callable[[Settings], str | None] = lambda _: None
    """Why a folder of this type would compute something else as the native class."""
    note: Callable[[Settings], str | None] = lambda _: None
    """What the native class leaves out."""


def why_not_converted(settings: Settings) -> str | None:
    """Why a config.json's model cannot be converted; None where it can."""
    family = LEGACY[settings["model_type"]]
    if settings.get("quantization_config") or settings.get("quantization_bit"):
        return "its weights are quantized. Take the folder that this one was made of"
    if "visual" in settings or "vision_config" in settings:
        return "it has a vision encoder of its own, which no language model of transformers takes"
    if any(settings.get(key) for key in ("num_experts", "moe_top_k")):
        return f"it is a mixture of experts, which {family.becomes} is not"
    return family.why_not(settings)


def _keep(settings: Settings, **changes: Any) -> dict[str, Any]:
    """The settings that have the same name and meaning in the native class, with what has not."""
    kept = {key: settings[key] for key in _KEPT if settings.get(key) is not None}
    return {"tie_word_embeddings": False, **kept, **changes}


# Qwen 1


def _qwen_settings(settings: Settings) -> dict[str, Any]:
    kept = _keep(
        settings,
        intermediate_size=settings["intermediate_size"] // 2,  # it counts gate and up together
        num_key_value_heads=settings["num_attention_heads"],
        max_position_embeddings=settings.get("seq_length", settings.get("max_position_embeddings", 8192)),
        rms_norm_eps=settings.get("layer_norm_epsilon", 1e-6),
        rope_theta=float(settings.get("rotary_emb_base", 10000)),
        hidden_act="silu",
    )
    kept.pop("rope_scaling", None)
    return kept


def _qwen_adapter(_: Settings) -> WeightAdapter:
    old, new = "transformer.h.{n}", "model.layers.{n}"
    return WeightAdapter(
        "Qwen 1's layout",
        (
            drop("{*outer}.inv_freq"),
            drop(f"{old}.attn.bias"),  # the causal mask, which some versions saved
            drop(f"{old}.attn.masked_bias"),
            split(_QKV, f"{old}.attn.c_attn.{{leaf}}"),
            rename(f"{new}.self_attn.o_proj.weight", f"{old}.attn.c_proj.weight"),
            rename(f"{new}.mlp.gate_proj.weight", f"{old}.mlp.w2.weight"),  # w1(x) * silu(w2(x))
            rename(f"{new}.mlp.up_proj.weight", f"{old}.mlp.w1.weight"),
            rename(f"{new}.mlp.down_proj.weight", f"{old}.mlp.c_proj.weight"),
            rename(f"{new}.input_layernorm.weight", f"{old}.ln_1.weight"),
            rename(f"{new}.post_attention_layernorm.weight", f"{old}.ln_2.weight"),
            rename("model.embed_tokens.weight", "transformer.wte.weight"),
            rename("model.norm.weight", "transformer.ln_f.weight"),
            rename("lm_head.weight", "lm_head.weight"),
        ),
    )


def _why_not_qwen(settings: Settings) -> str | None:
    if settings.get("rotary_pct", 1.0) != 1.0:
        return "it rotates a part of each head (rotary_pct), and Qwen2 all of it"
    if not settings.get("no_bias", True):
        return "its output layers have biases (no_bias: false), and Qwen2's have none"
    width = settings.get("kv_channels", 128) * settings["num_attention_heads"]
    if width != settings["hidden_size"]:
        return f"its heads are {width} wide together, and the model {settings['hidden_size']}"
    return None


def _note_qwen(settings: Settings) -> str | None:
    if not (settings.get("use_dynamic_ntk") or settings.get("use_logn_attn")):
        return None
    length = settings.get("seq_length", 8192)
    return (
        f"up to {length:,} tokens it computes what the original does. Beyond, the original stretches its rotations and "
        "scales its queries (dynamic NTK, LogN), in answers and not in training; Qwen2 does not"
    )


# InternLM


def _internlm_settings(settings: Settings) -> dict[str, Any]:
    rotary = settings.get("rotary") or {}
    changes: dict[str, Any] = {"attention_bias": bool(settings.get("bias", True)), "hidden_act": "silu"}
    if rotary:
        changes["rope_theta"] = float(rotary.get("base", 10000))
    if rotary.get("type") == "dynamic":
        changes["rope_scaling"] = {"type": "dynamic", "factor": float(rotary.get("scaling_factor", 1.0))}
    return _keep(settings, **changes)


def _why_not_internlm(settings: Settings) -> str | None:
    kind = (settings.get("rotary") or {}).get("type", "origin")
    return None if kind in ("origin", "dynamic") else f"its rotations are of type {kind!r}, known: origin, dynamic"


def _internlm2_adapter(settings: Settings) -> WeightAdapter:
    heads, groups = settings["num_attention_heads"], _num_groups(settings)
    old, new = "model.layers.{n}", "model.layers.{n}"
    return WeightAdapter(
        "InternLM2's layout",
        (
            drop("{*outer}.inv_freq"),
            _grouped(_QKV, f"{old}.attention.wqkv.{{leaf}}", groups, heads // groups),
            rename(f"{new}.self_attn.o_proj.{{leaf}}", f"{old}.attention.wo.{{leaf}}"),
            rename(f"{new}.mlp.gate_proj.weight", f"{old}.feed_forward.w1.weight"),
            rename(f"{new}.mlp.up_proj.weight", f"{old}.feed_forward.w3.weight"),
            rename(f"{new}.mlp.down_proj.weight", f"{old}.feed_forward.w2.weight"),
            rename(f"{new}.input_layernorm.weight", f"{old}.attention_norm.weight"),
            rename(f"{new}.post_attention_layernorm.weight", f"{old}.ffn_norm.weight"),
            rename("model.embed_tokens.weight", "model.tok_embeddings.weight"),
            rename("model.norm.weight", "model.norm.weight"),
            rename("lm_head.weight", "output.weight"),
        ),
    )


def _num_groups(settings: Settings) -> int:
    return int(settings.get("num_key_value_heads") or settings["num_attention_heads"])


def _grouped(ours: tuple[str, ...], theirs: str, groups: int, queries: int) -> Rule:
    """Rows that lie group by group: the `queries` heads of a group, its key, its value."""

    def to_ours(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """[groups * (queries + 2) * head width, ...] -> query, key and value, each [heads * head width, ...]."""
        (fused,) = tensors
        heads = fused.reshape(groups, queries + 2, -1, *fused.shape[1:])
        parts = heads[:, :queries], heads[:, queries], heads[:, queries + 1]
        return [part.reshape(-1, *fused.shape[1:]) for part in parts]

    def from_ours(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The way back; [...] as above."""
        rest = tensors[0].shape[1:]
        heads = [
            tensor.reshape(groups, count, -1, *rest) for tensor, count in zip(tensors, (queries, 1, 1), strict=True)
        ]
        return [torch.cat(heads, dim=1).reshape(-1, *rest)]

    return Rule(ours, (theirs,), to_ours, from_ours)


# Layouts with Llama's names


def _llama_adapter(layout: str, *rules: Rule) -> Callable[[Settings], WeightAdapter]:
    adapter = WeightAdapter(layout, (drop("{*outer}.inv_freq"), *rules, rename("{*name}", "{*name}")))
    return lambda _: adapter


# Baichuan

_PACKED = split(_QKV, "model.layers.{n}.self_attn.W_pack.{leaf}")
_NORMED_HEAD = Rule(("lm_head.weight",), ("lm_head.weight",), lambda tensors: [_normalise(tensors[0])], None)
_BAICHUAN = _llama_adapter("Baichuan's layout", _PACKED)
_BAICHUAN2 = _llama_adapter("Baichuan2's layout", _PACKED, _NORMED_HEAD)


def _normalise(weight: Tensor) -> Tensor:
    """[V, D] with rows of length 1, in its dtype. Baichuan2's head does it in every forward."""
    return torch.nn.functional.normalize(weight.float(), dim=-1).to(weight.dtype)


def _is_baichuan2(settings: Settings) -> bool:
    return "z_loss_weight" in settings or settings.get("vocab_size") == 125696


def _why_not_baichuan(settings: Settings) -> str | None:
    # the 7B models' config.json has max_position_embeddings, the 13B models' model_max_length alone
    if "max_position_embeddings" in settings and settings.get("num_attention_heads") != 40:
        return None
    return (
        "the 13B models tell positions by ALiBi (a penalty on distance), and no class of transformers has ALiBi beside "
        "RMSNorm and a gated MLP: Llama rotates, BLOOM, MPT and Falcon have LayerNorm and an MLP without a gate. "
        "Take Baichuan2-7B, or a Qwen2.5 of 14B"
    )


# ChatGLM


def _chatglm_settings(settings: Settings) -> dict[str, Any]:
    ratio = float(settings.get("rope_ratio", 1))
    stretches = ratio != 1 and _rope_of_chatglm(settings) == "positions"
    kept = _keep(
        settings,
        vocab_size=settings["padded_vocab_size"],
        num_hidden_layers=settings["num_layers"],
        intermediate_size=settings["ffn_hidden_size"],
        num_key_value_heads=settings["multi_query_group_num"],
        head_dim=settings["kv_channels"],
        max_position_embeddings=settings.get("seq_length", 8192),
        rms_norm_eps=settings["layernorm_epsilon"],
        rope_theta=10000.0 * (1 if stretches else ratio),
        partial_rotary_factor=0.5,
        attention_bias=bool(settings.get("add_qkv_bias", False)),
        hidden_act="silu",
        pad_token_id=settings.get("pad_token_id", 0),  # GLM's own default is of a larger vocabulary
    )
    if stretches:
        kept["rope_scaling"] = {"rope_type": "linear", "factor": ratio}
    return kept


def _rope_of_chatglm(settings: Settings) -> str | None:
    """What rope_ratio does: ChatGLM2-6B-32k divides positions by it, later ones multiply the base; None: unknown."""
    name = str(settings.get("_name_or_path", "")).lower()
    if "chatglm2" in name:
        return "positions"
    return "base" if "chatglm3" in name or "glm-4" in name or settings["padded_vocab_size"] > 65024 else None


def _why_not_chatglm(settings: Settings) -> str | None:
    if "position_encoding_2d" in settings or not settings.get("multi_query_attention"):
        return "it is ChatGLM of the first series, whose positions have two dimensions. Take ChatGLM2, 3 or GLM-4"
    expected = {
        "rmsnorm": True, "post_layer_norm": True, "apply_residual_connection_post_layernorm": False,
        "add_bias_linear": False,
    }  # fmt: skip
    for key, value in expected.items():
        if settings.get(key, value) != value:
            return f"{key} is {settings[key]}, and GLM has it {value}"
    if settings.get("pre_seq_len"):
        return "it has a learned prefix (pre_seq_len), which GLM has not"
    if settings.get("rope_ratio", 1) != 1 and _rope_of_chatglm(settings) is None:
        return (
            "its rope_ratio divides positions in ChatGLM2 and multiplies the base in ChatGLM3, and its config.json "
            "does not say which it is: write the original's name there as _name_or_path, such as THUDM/chatglm3-6b-32k"
        )
    return None


def _chatglm_adapter(settings: Settings) -> WeightAdapter:
    width, groups = settings["kv_channels"], settings["multi_query_group_num"]
    sizes = (settings["num_attention_heads"] * width, groups * width, groups * width)
    old, new = "transformer.encoder.layers.{n}", "model.layers.{n}"
    return WeightAdapter(
        "ChatGLM's layout",
        (
            drop("{*outer}.inv_freq"),
            split(_QKV, f"{old}.self_attention.query_key_value.{{leaf}}", sizes=sizes),
            rename(f"{new}.self_attn.o_proj.weight", f"{old}.self_attention.dense.weight"),
            rename(f"{new}.mlp.gate_up_proj.weight", f"{old}.mlp.dense_h_to_4h.weight"),
            rename(f"{new}.mlp.down_proj.weight", f"{old}.mlp.dense_4h_to_h.weight"),
            rename(f"{new}.input_layernorm.weight", f"{old}.input_layernorm.weight"),
            rename(f"{new}.post_attention_layernorm.weight", f"{old}.post_attention_layernorm.weight"),
            rename("model.embed_tokens.weight", "transformer.embedding.word_embeddings.weight"),
            rename("model.norm.weight", "transformer.encoder.final_layernorm.weight"),
            rename("lm_head.weight", "transformer.output_layer.weight"),
        ),
    )


# by the model type of the old config.json
LEGACY: dict[str, LegacyFamily] = {
    "qwen": LegacyFamily("Qwen 1", "qwen2", _qwen_settings, _qwen_adapter, _why_not_qwen, _note_qwen),
    "internlm": LegacyFamily(
        "InternLM 1",
        "llama",
        _internlm_settings,
        _llama_adapter("InternLM's layout"),
        _why_not_internlm,
    ),
    "internlm2": LegacyFamily(
        "InternLM 2, 2.5",
        "llama",
        lambda settings: _keep(settings, attention_bias=bool(settings.get("bias", False))),
        _internlm2_adapter,
    ),
    "baichuan": LegacyFamily(
        "Baichuan, Baichuan2 7B",
        "llama",
        lambda settings: _keep(settings, tie_word_embeddings=False),
        lambda settings: (_BAICHUAN2 if _is_baichuan2(settings) else _BAICHUAN)(settings),
        _why_not_baichuan,
    ),
    "xverse": LegacyFamily("XVERSE", "llama", _keep, _llama_adapter("XVERSE's layout")),
    "chatglm": LegacyFamily(
        "ChatGLM2, ChatGLM3, GLM-4",
        "glm",
        _chatglm_settings,
        _chatglm_adapter,
        _why_not_chatglm,
    ),
}
