"""The decoders that `vlm convert legacy` reads, each written out once more from its published description.

Plain functions of a dict of weights by the names that the folders have. B is 1 and left out: [L, D] throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def angles(length: int, width: int, base: float, step: float = 1.0) -> Tensor:
    """[L, width / 2]: of the n-th position and the k-th pair, n * step / base ** (2k / width)."""
    return torch.outer(torch.arange(length) * step, base ** (-torch.arange(0, width, 2) / width))


def rotate_halves(x: Tensor, angle: Tensor) -> Tensor:
    """[h, L, d]: number k of a head is turned with number k + d/2 (GPT-NeoX)."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def rotate_pairs(x: Tensor, angle: Tensor) -> Tensor:
    """[h, L, d]: number 2k of a head is turned with number 2k + 1 (GPT-J)."""
    even, odd = x[..., ::2], x[..., 1::2]
    turned = even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()
    return torch.stack(turned, -1).flatten(-2)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[h, L, d], and [g, L, d] of keys and values, each shared by h / g heads in a row -> [L, h * d]."""
    shared = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(shared, 0), value.repeat_interleave(shared, 0)
    scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
    later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ value).transpose(0, 1).flatten(1)


def heads(x: Tensor, count: int) -> Tensor:
    """[L, h * d] -> [h, L, d]"""
    return x.unflatten(-1, (count, -1)).transpose(0, 1)


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def qwen(w: Weights, c: dict[str, Any], ids: Tensor) -> Tensor:
    """Qwen 1: one biased matrix for query, key and value, whole thirds; w1(x) * silu(w2(x))."""
    x = w["transformer.wte.weight"][ids]
    turn = angles(len(ids), c["kv_channels"], c["rotary_emb_base"])
    for n in range(c["num_hidden_layers"]):
        part = {name.removeprefix(f"transformer.h.{n}."): t for name, t in w.items()}
        h = rms_norm(x, part["ln_1.weight"], c["layer_norm_epsilon"])
        q, k, v = (h @ part["attn.c_attn.weight"].T + part["attn.c_attn.bias"]).chunk(3, -1)
        q, k, v = (heads(each, c["num_attention_heads"]) for each in (q, k, v))
        x = x + attend(rotate_halves(q, turn), rotate_halves(k, turn), v) @ part["attn.c_proj.weight"].T
        h = rms_norm(x, part["ln_2.weight"], c["layer_norm_epsilon"])
        x = x + (h @ part["mlp.w1.weight"].T * silu(h @ part["mlp.w2.weight"].T)) @ part["mlp.c_proj.weight"].T
    return rms_norm(x, w["transformer.ln_f.weight"], c["layer_norm_epsilon"]) @ w["lm_head.weight"].T


def internlm2(w: Weights, c: dict[str, Any], ids: Tensor) -> Tensor:
    """InternLM2: wqkv group by group, the queries of the group, its key, its value; w2(silu(w1(x)) * w3(x))."""
    x = w["model.tok_embeddings.weight"][ids]
    groups, num_heads, eps = c["num_key_value_heads"], c["num_attention_heads"], c["rms_norm_eps"]
    width = c["hidden_size"] // num_heads
    turn = angles(len(ids), width, c["rope_theta"])
    for n in range(c["num_hidden_layers"]):
        part = {name.removeprefix(f"model.layers.{n}."): t for name, t in w.items()}
        fused = rms_norm(x, part["attention_norm.weight"], eps) @ part["attention.wqkv.weight"].T
        fused = fused.view(len(ids), groups, num_heads // groups + 2, width)
        q = fused[:, :, :-2].reshape(len(ids), num_heads, width).transpose(0, 1)
        k, v = (fused[:, :, i].transpose(0, 1) for i in (-2, -1))
        x = x + attend(rotate_halves(q, turn), rotate_halves(k, turn), v) @ part["attention.wo.weight"].T
        h = rms_norm(x, part["ffn_norm.weight"], eps)
        gate, up = h @ part["feed_forward.w1.weight"].T, h @ part["feed_forward.w3.weight"].T
        x = x + (silu(gate) * up) @ part["feed_forward.w2.weight"].T
    return rms_norm(x, w["model.norm.weight"], eps) @ w["output.weight"].T


def like_llama(project: Callable[[Weights, Tensor], list[Tensor]], normed_head: bool = False) -> Callable[..., Tensor]:
    """Llama's blocks and names (InternLM, Baichuan, XVERSE); `project`: weights and x -> query, key, value."""

    def decoder(w: Weights, c: dict[str, Any], ids: Tensor) -> Tensor:
        x = w["model.embed_tokens.weight"][ids]
        num_heads, eps = c["num_attention_heads"], c["rms_norm_eps"]
        turn = angles(len(ids), c["hidden_size"] // num_heads, 10000)
        for n in range(c["num_hidden_layers"]):
            part = {name.removeprefix(f"model.layers.{n}."): t for name, t in w.items()}
            q, k, v = project(part, rms_norm(x, part["input_layernorm.weight"], eps))
            q, k, v = (heads(each, num_heads) for each in (q, k, v))
            out = attend(rotate_halves(q, turn), rotate_halves(k, turn), v) @ part["self_attn.o_proj.weight"].T
            x = x + out + part.get("self_attn.o_proj.bias", 0)
            h = rms_norm(x, part["post_attention_layernorm.weight"], eps)
            gate, up = h @ part["mlp.gate_proj.weight"].T, h @ part["mlp.up_proj.weight"].T
            x = x + (silu(gate) * up) @ part["mlp.down_proj.weight"].T
        head = w["lm_head.weight"]
        if normed_head:
            head = head / head.norm(dim=-1, keepdim=True)
        return rms_norm(x, w["model.norm.weight"], eps) @ head.T

    return decoder


def apart(part: Weights, x: Tensor) -> list[Tensor]:
    return [x @ part[f"self_attn.{name}_proj.weight"].T + part.get(f"self_attn.{name}_proj.bias", 0) for name in "qkv"]


def packed(part: Weights, x: Tensor) -> list[Tensor]:
    return list((x @ part["self_attn.W_pack.weight"].T).chunk(3, -1))


def chatglm(w: Weights, c: dict[str, Any], ids: Tensor) -> Tensor:
    """ChatGLM2 and 3: the first half of a head is turned, by pairs; few keys and values; a gated MLP in one matrix."""
    x = w["transformer.embedding.word_embeddings.weight"][ids]
    num_heads, groups, width, eps = (
        c[key] for key in ("num_attention_heads", "multi_query_group_num", "kv_channels", "layernorm_epsilon")
    )
    ratio = c.get("rope_ratio", 1)
    is_second = "chatglm2" in c.get("_name_or_path", "")
    turn = angles(len(ids), width // 2, 10000 * (1 if is_second else ratio), 1 / ratio if is_second else 1)

    def rotate(h: Tensor) -> Tensor:
        return torch.cat([rotate_pairs(h[..., : width // 2], turn), h[..., width // 2 :]], -1)

    for n in range(c["num_layers"]):
        part = {name.removeprefix(f"transformer.encoder.layers.{n}."): t for name, t in w.items()}
        h = rms_norm(x, part["input_layernorm.weight"], eps)
        fused = h @ part["self_attention.query_key_value.weight"].T + part["self_attention.query_key_value.bias"]
        q, k, v = fused.split([num_heads * width, groups * width, groups * width], -1)
        q, k, v = heads(q, num_heads), heads(k, groups), heads(v, groups)
        x = x + attend(rotate(q), rotate(k), v) @ part["self_attention.dense.weight"].T
        gate, up = (
            rms_norm(x, part["post_attention_layernorm.weight"], eps) @ part["mlp.dense_h_to_4h.weight"].T
        ).chunk(2, -1)
        x = x + (silu(gate) * up) @ part["mlp.dense_4h_to_h.weight"].T
    return rms_norm(x, w["transformer.encoder.final_layernorm.weight"], eps) @ w["transformer.output_layer.weight"].T
