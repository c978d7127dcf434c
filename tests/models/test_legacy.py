"""`vlm convert legacy`: what it writes computes what the original layer does, and its tokenizer travels."""

from __future__ import annotations

import base64
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from legacy_layers import apart, chatglm, internlm2, like_llama, packed, qwen
from safetensors.torch import save_file
from tokenizers_for_tests import sentencepiece_model
from torch import Tensor

from vlm.artifacts.legacy import convert_legacy
from vlm.compat import prepare
from vlm.errors import CheckpointError, ConfigError
from vlm.models.legacy import LEGACY
from vlm.models.llm import load_tokenizer
from vlm.models.native import why_not_native
from vlm.models.weight_files import WeightFiles

V, D, H, G, F, N = 480, 32, 4, 2, 48, 2  # vocabulary, width, heads, key heads, MLP, blocks
WORST = 1e-5  # of the largest logit; the worst seen is 1.4e-6 (internlm2)


@dataclass
class Old:
    """A published family at toy size."""

    config: dict[str, Any]
    shapes: Callable[[], dict[str, tuple[int, ...]]]
    forward: Callable[[dict[str, Tensor], dict[str, Any], Tensor], Tensor]
    vocabulary: str = "tokenizer.model"


def numbered(block: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{block}.{n}.{name}": shape for n in range(N) for name, shape in shapes.items()}


def qwen_shapes() -> dict[str, tuple[int, ...]]:
    block = {
        "ln_1.weight": (D,), "attn.c_attn.weight": (3 * D, D), "attn.c_attn.bias": (3 * D,),
        "attn.c_proj.weight": (D, D), "ln_2.weight": (D,), "mlp.w1.weight": (F, D), "mlp.w2.weight": (F, D),
        "mlp.c_proj.weight": (D, F),
    }  # fmt: skip
    ends = {"transformer.wte.weight": (V, D), "transformer.ln_f.weight": (D,), "lm_head.weight": (V, D)}
    return ends | numbered("transformer.h", block) | {"transformer.rotary_emb.inv_freq": (4,)}


def internlm2_shapes() -> dict[str, tuple[int, ...]]:
    block = {
        "attention_norm.weight": (D,), "attention.wqkv.weight": ((H + 2 * G) * D // H, D),
        "attention.wo.weight": (D, D), "ffn_norm.weight": (D,), "feed_forward.w1.weight": (F, D),
        "feed_forward.w3.weight": (F, D), "feed_forward.w2.weight": (D, F),
    }  # fmt: skip
    ends = {"model.tok_embeddings.weight": (V, D), "model.norm.weight": (D,), "output.weight": (V, D)}
    return ends | numbered("model.layers", block)


def llama_shapes(*, bias: bool = False, pack: bool = False) -> dict[str, tuple[int, ...]]:
    names = [] if pack else [f"self_attn.{name}_proj" for name in "qkv"]
    block: dict[str, tuple[int, ...]] = {f"{name}.weight": (D, D) for name in [*names, "self_attn.o_proj"]}
    if pack:
        block["self_attn.W_pack.weight"] = (3 * D, D)
    if bias:
        block |= {f"{name}.bias": (D,) for name in [*names, "self_attn.o_proj"]}
    block |= {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
    block |= {"mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D), "mlp.down_proj.weight": (D, F)}
    block |= {"self_attn.rotary_emb.inv_freq": (4,)}
    ends = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    return ends | numbered("model.layers", block)


def chatglm_shapes() -> dict[str, tuple[int, ...]]:
    block = {
        "input_layernorm.weight": (D,), "self_attention.query_key_value.weight": ((H + 2 * G) * 8, D),
        "self_attention.query_key_value.bias": ((H + 2 * G) * 8,), "self_attention.dense.weight": (D, D),
        "post_attention_layernorm.weight": (D,), "mlp.dense_h_to_4h.weight": (2 * F, D),
        "mlp.dense_4h_to_h.weight": (D, F),
    }  # fmt: skip
    outer = {
        "transformer.embedding.word_embeddings.weight": (V, D), "transformer.encoder.final_layernorm.weight": (D,),
        "transformer.output_layer.weight": (V, D), "transformer.rotary_pos_emb.inv_freq": (2,),
    }  # fmt: skip
    return outer | numbered("transformer.encoder.layers", block)


SIZES = {"vocab_size": V, "hidden_size": D, "num_attention_heads": H, "num_hidden_layers": N, "hidden_act": "silu"}
LLAMA = SIZES | {"intermediate_size": F, "rms_norm_eps": 1e-6, "max_position_embeddings": 64}
QWEN = SIZES | {
    "model_type": "qwen", "intermediate_size": 2 * F, "kv_channels": 8, "layer_norm_epsilon": 1e-6, "no_bias": True,
    "rotary_emb_base": 10000, "rotary_pct": 1.0, "seq_length": 64, "use_dynamic_ntk": True, "use_logn_attn": True,
}  # fmt: skip
BAICHUAN = LLAMA | {"model_type": "baichuan"}
CHATGLM = {
    "model_type": "chatglm", "hidden_size": D, "num_attention_heads": H, "num_layers": N, "ffn_hidden_size": F,
    "kv_channels": 8, "multi_query_attention": True, "multi_query_group_num": G, "padded_vocab_size": V,
    "layernorm_epsilon": 1e-5, "add_qkv_bias": True, "add_bias_linear": False, "rmsnorm": True, "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False, "seq_length": 64, "original_rope": True, "eos_token_id": 2,
}  # fmt: skip
OLD = {
    "qwen": Old(QWEN, qwen_shapes, qwen, "qwen.tiktoken"),
    "internlm2": Old(
        LLAMA | {"model_type": "internlm2", "num_key_value_heads": G, "bias": False, "rope_theta": 1e6},
        internlm2_shapes, internlm2,
    ),
    "internlm": Old(
        LLAMA | {"model_type": "internlm", "bias": True}, lambda: llama_shapes(bias=True), like_llama(apart)
    ),
    "baichuan": Old(BAICHUAN, lambda: llama_shapes(pack=True), like_llama(packed)),
    "baichuan2": Old(
        BAICHUAN | {"z_loss_weight": 0}, lambda: llama_shapes(pack=True), like_llama(packed, normed_head=True)
    ),
    "xverse": Old(LLAMA | {"model_type": "xverse"}, llama_shapes, like_llama(apart)),
    "chatglm": Old(CHATGLM, chatglm_shapes, chatglm),
    "chatglm3 long": Old(
        CHATGLM | {"rope_ratio": 50, "_name_or_path": "THUDM/chatglm3-6b-32k"}, chatglm_shapes, chatglm
    ),
    "chatglm2 long": Old(
        CHATGLM | {"rope_ratio": 4, "_name_or_path": "THUDM/chatglm2-6b-32k"}, chatglm_shapes, chatglm
    ),
}  # fmt: skip


@cache
def sentencepiece() -> bytes:
    return sentencepiece_model()  # 420 pieces


WORDS = [
    *(bytes([byte]) for byte in range(256)), b"th", b"the", b" the", b" d", b"og", b" dog", b"12", b"123", b"\xcc\x81",
]  # fmt: skip


def tiktoken() -> bytes:
    return b"".join(base64.b64encode(word) + b" %d\n" % rank for rank, word in enumerate(WORDS))


def weights_of(old: Old) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) * 0.3 + (len(shape) == 1) for name, shape in old.shapes().items()}


def write_old(folder: Path, name: str = "baichuan", form: str = "safetensors", **changes: Any) -> Path:
    """A folder as it was published: config.json with `auto_map`, weights, a vocabulary."""
    old = OLD[name]
    folder.mkdir()
    settings = {**old.config, "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}, **changes}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "modeling_own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    (folder / old.vocabulary).write_bytes(tiktoken() if "tiktoken" in old.vocabulary else sentencepiece())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "OwnTokenizer"}))
    weights = weights_of(old)
    if form == "safetensors":
        save_file(weights, folder / "model.safetensors")
    elif form == "shards":  # two .bin files and their index
        halves = [dict(list(weights.items())[part::2]) for part in (0, 1)]
        places = {name: f"pytorch_model-{n}.bin" for n, half in enumerate(halves) for name in half}
        for n, half in enumerate(halves):
            torch.save(half, folder / f"pytorch_model-{n}.bin")
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    elif form == "legacy":  # torch before 1.6
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif form == "pth":
        torch.save({"model": weights}, folder / "consolidated.pth")
    return folder


def load(folder: Path) -> Any:
    prepare()
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("name", OLD)
def test_the_native_class_computes_what_the_original_layer_does(name: str, tmp_path: Path):
    """Logits of 24 tokens in fp32, relative to the largest."""
    folder = write_old(tmp_path / "old", name)
    convert_legacy(folder, tmp_path / "new")
    ids = torch.randint(V, (24,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = OLD[name].forward(weights_of(OLD[name]), OLD[name].config, ids)
        model = load(tmp_path / "new")
        got = model(ids[None], use_cache=False).logits[0]
    assert model.config.model_type == LEGACY[OLD[name].config["model_type"]].becomes
    assert float((got - expected).abs().max() / expected.abs().max()) < WORST
    assert not (folder / "ran").exists()


def test_every_family_has_its_layer_here():
    assert {old.config["model_type"] for old in OLD.values()} == LEGACY.keys()


@pytest.mark.parametrize("form", ["shards", "legacy", "pth"])
def test_pickled_weights_are_read_as_tensors_and_become_safetensors(form: str, tmp_path: Path):
    convert_legacy(write_old(tmp_path / "a", "qwen"), tmp_path / "straight")
    convert_legacy(write_old(tmp_path / "b", "qwen", form), tmp_path / "new", max_shard_size="30KB")
    straight, new = WeightFiles(str(tmp_path / "straight")), WeightFiles(str(tmp_path / "new"))
    assert straight.shapes == new.shapes
    assert all(torch.equal(straight[name], new[name]) for name in straight)
    files = sorted(file.name for file in (tmp_path / "new").glob("model-*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all(file.stat().st_size < 70_000 for file in (tmp_path / "new").glob("model-*"))  # the embedding: 61,440


def test_no_code_in_a_pickle_runs(tmp_path: Path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    folder = write_old(tmp_path / "old", form="none")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Attack()}, protocol=2))
    with pytest.raises(CheckpointError, match=r"cannot be read as plain tensors.*can run code and is never loaded"):
        convert_legacy(folder, tmp_path / "new")
    assert not (tmp_path / "attacked").exists()
    assert not (tmp_path / "new").exists()


def test_the_grouped_split_of_internlm2_has_a_way_back_to_the_bit():
    weights = weights_of(OLD["internlm2"])
    adapter = LEGACY["internlm2"].adapter(OLD["internlm2"].config)
    ours = adapter.to_ours(weights)
    assert ours.is_invertible
    back = adapter.from_ours(dict(ours))
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())


# Tokenizers


def test_a_qwen_tiktoken_vocabulary_writes_tiktokens_ids_and_has_qwens_control_tokens(tmp_path: Path):
    from tiktoken import Encoding

    convert_legacy(write_old(tmp_path / "old", "qwen"), tmp_path / "new")
    tokenizer = load_tokenizer(str(tmp_path / "new"))
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    expected = Encoding("q", pat_str=words, mergeable_ranks={w: n for n, w in enumerate(WORDS)}, special_tokens={})
    for text in ("the dog, the dogs", "这是什么？", "12345", " \n\n x", "don't"):
        assert tokenizer.encode(text, add_special_tokens=False) == expected.encode(text), text
    assert tokenizer.encode("e\u0301") == expected.encode("\u00e9")  # NFC: one character
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_204|>"]) == [
        265, 266, 267, 472,
    ]  # fmt: skip
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|endoftext|>")


def test_chatglms_texts_begin_with_gmask_and_sop(tmp_path: Path):
    convert_legacy(write_old(tmp_path / "old", "chatglm"), tmp_path / "new")
    tokenizer = load_tokenizer(str(tmp_path / "new"))
    assert tokenizer.convert_ids_to_tokens(range(420, 425)) == ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
    ids = tokenizer("A dog").input_ids
    assert ids[:2] == [421, 423]
    assert ids[2:] == tokenizer.encode("A dog", add_special_tokens=False)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "<unk>")
    written = json.loads((tmp_path / "new/generation_config.json").read_text())
    assert written["eos_token_id"] == 2


def test_the_folder_loads_without_the_code_it_came_with(tmp_path: Path):
    convert_legacy(write_old(tmp_path / "old", "internlm2"), tmp_path / "new")
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in (tmp_path / "new" / name).read_text()
    assert json.loads((tmp_path / "new/config.json").read_text())["rope_theta"] == 1e6  # for older readers too
    assert load_tokenizer(str(tmp_path / "new")).bos_token_id == 1
    assert not list((tmp_path / "new").glob("*.py"))


# Refusals


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("baichuan", {"max_position_embeddings": None, "model_max_length": 4096}, "no class of transformers has ALiBi"),
        ("baichuan", {"num_attention_heads": 40}, "13B models tell positions by ALiBi"),
        ("qwen", {"visual": {}}, "a vision encoder of its own"),
        ("qwen", {"quantization_config": {"bits": 4}}, "quantized. Take the folder"),
        ("qwen", {"no_bias": False}, "biases"),
        ("xverse", {"num_experts": 8}, "mixture of experts"),
        ("internlm", {"rotary": {"type": "other"}}, "rotations are of type 'other'"),
        ("chatglm", {"rope_ratio": 50}, "write the original's name there as _name_or_path"),
        ("chatglm", {"position_encoding_2d": True}, "first series"),
        ("chatglm", {"add_bias_linear": True}, "add_bias_linear is True"),
    ],
)
def test_what_would_compute_something_else_is_refused_with_the_reason(
    name: str, changes: dict[str, Any], reason: str, tmp_path: Path
):
    folder = write_old(tmp_path / "old", name)
    settings = {**OLD[name].config, **changes}
    (folder / "config.json").write_text(json.dumps({key: v for key, v in settings.items() if v is not None}))
    with pytest.raises(ConfigError, match=reason):
        convert_legacy(folder, tmp_path / "new")


def test_types_without_a_conversion_and_native_ones_are_told_apart(tmp_path: Path):
    folder = write_old(tmp_path / "old")
    for kind, words in (("llama", "takes it as it is"), ("moss", "there is of qwen, internlm, internlm2")):
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(ConfigError, match=words):
            convert_legacy(folder, tmp_path / "new")


def test_tensors_that_the_type_does_not_have_are_named(tmp_path: Path):
    folder = write_old(tmp_path / "old", form="none")
    save_file(weights_of(OLD["baichuan"]) | {"v_head.weight": torch.zeros(1, D)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"v_head.weight: \(1, 32\), LlamaForCausalLM has none"):
        convert_legacy(folder, tmp_path / "new")
    short = {name: tensor for name, tensor in weights_of(OLD["baichuan"]).items() if ".1." not in name}
    save_file(short, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)layers.1.input_layernorm.weight: missing.*a shard is missing"):
        convert_legacy(folder, tmp_path / "new")


@pytest.mark.parametrize("kind", LEGACY)
def test_who_names_such_a_folder_is_told_of_the_conversion(kind: str):
    message = why_not_native({"model_type": kind, "auto_map": {}}, trust_remote_code=False)
    assert message is not None
    assert "`vlm convert legacy FOLDER OUT`" in message
