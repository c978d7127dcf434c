"""Causal language models of every type that transformers has, a few thousand weights each, from their config classes.

Field names decide most sizes (`SIZES`); `SPECIAL` says what a type needs beside that to be built, and what makes it
show all kinds of blocks that it has.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from vlm.compat import prepare

WIDTH, HEADS, HEAD_WIDTH, VOCABULARY, LENGTH, WINDOW = 64, 4, 16, 64, 128, 6
MOST_PARAMETERS = 8_000_000

# Config fields of transformers, and what they are in a toy. Only those that a config class declares are set.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("lru_width", "attention_hidden_size", "input_embedding_size", "output_embedding_size"), WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "backbone_hidden_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "dim_ff"), 2 * WIDTH),
    **dict.fromkeys(("n_inner", "d_inner", "ffn_hidden_size", "feed_forward_size", "intermediate_size_mlp"), 2 * WIDTH),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), WIDTH),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_experts_intermediate_size", "dense_intermediate_size"), WIDTH),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "prefix_dense_intermediate_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "num_blocks"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("attention_heads", "swa_num_attention_heads", "linear_num_heads", "mamba_n_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "n_mamba_heads"), HEADS),
    **dict.fromkeys(("head_dim", "kv_channels", "dim_head", "d_head", "attention_head_size", "v_head_dim"), HEAD_WIDTH),
    **dict.fromkeys(("swa_head_dim", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), HEAD_WIDTH),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "index_head_dim", "attention_head_dim"), HEAD_WIDTH),
    **dict.fromkeys(("mamba_head_dim", "mamba_d_head", "query_pre_attn_scalar"), HEAD_WIDTH),
    **dict.fromkeys(("rotary_dim", "q_lora_rank", "kv_lora_rank", "o_lora_rank", "laurel_rank"), HEAD_WIDTH),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "adapter_rank"), HEAD_WIDTH),
    "router_hidden_size": HEAD_WIDTH,
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups", "mamba_ngroups", "o_groups"), 1),
    **dict.fromkeys(("num_dense_layers", "first_k_dense_replace", "n_input_layers", "n_output_layers"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), LENGTH),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), WINDOW),
    **dict.fromkeys(("local_attention", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size"), 8),
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "hidden_dropout_prob", "embd_pdrop"), 0.0),
    **dict.fromkeys(("attention_probs_dropout_prob", "resid_pdrop", "hidden_dropout", "residual_dropout"), 0.0),
    **dict.fromkeys(("resid_dropout", "embed_dropout", "embedding_dropout", "classifier_dropout"), 0.0),
    "hidden_size_per_layer_input": 16, "num_mtp_layers": 0, "num_nextn_predict_layers": 0, "expand": 2,
    "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 2, "type_vocab_size": 2, "mamba_expand": 1,
    "index_topk": WINDOW, "index_n_heads": 16, "index_block_size": 4, "index_topk_blocks": 2, "indexer_budget": 8,
    "attn_pdrop": 0, "use_cache": True, "is_decoder": True, "clip_qkv": 8.0,
}  # fmt: skip

_WINDOW_THEN_FULL = ["sliding_attention", "full_attention"] * 2
_LINEAR_THEN_FULL = ["linear_attention", "full_attention"] * 2
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _LINEAR_THEN_FULL},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": _WINDOW_THEN_FULL,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dots1": {"layer_types": _WINDOW_THEN_FULL, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": WIDTH, "embedding_multiplier": 4.0},  # of given embeddings it does without
    "gemma3_text": {"layer_types": _WINDOW_THEN_FULL},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": _WINDOW_THEN_FULL},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _LINEAR_THEN_FULL},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _LINEAR_THEN_FULL},
    "kolibri1": {"layer_types": _WINDOW_THEN_FULL},
    "laguna": {"layer_types": _WINDOW_THEN_FULL},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": _WINDOW_THEN_FULL},
    "ministral": {"layer_types": _WINDOW_THEN_FULL},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_WIDTH,
                       "indexer_compress_ratio": 4},
    "reformer": {"axial_pos_shape": (16, 8), "axial_pos_embds_dim": (32, 32), "attn_layers": ["local", "lsh"]},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * HEAD_WIDTH, "num_key_value_heads": HEADS,
              "num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def toy_config(model_type: str, **changes: Any) -> Any:
    """A config of this type, small."""
    prepare()
    from transformers import CONFIG_MAPPING

    return _toy(CONFIG_MAPPING[model_type], changes)


def _toy(cls: Any, changes: dict[str, Any]) -> Any:
    """A config of this class with small parts: those of encoders too, where it has any."""
    from transformers import AutoConfig

    names = {field.name for field in dataclasses.fields(cls)}
    settings = {name: value for name, value in SIZES.items() if name in names}
    if "kv_lora_rank" in names:  # multi-head latent attention has keys for every head
        settings["num_key_value_heads"] = HEADS
    parts = getattr(cls, "sub_configs", {}).items()
    if any(part is AutoConfig for _, part in parts):  # the class knows which
        default = cls()
        parts = [(name, type(getattr(default, name))) for name, _ in parts if getattr(default, name, None) is not None]
    settings |= {name: _toy(part, {}) for name, part in parts}
    return cls(**settings | SPECIAL.get(cls.model_type, {}) | changes)


def toy_decoder(model_type: str, **changes: Any) -> Any:
    """A model of this type whose every weight matters, in float32 and evaluation mode.

    Raises:
        ValueError: it would still be large.
    """
    config = toy_config(model_type, **changes)
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count / 1e6:.0f} million parameters at toy size")
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()
