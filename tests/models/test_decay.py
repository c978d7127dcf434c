"""What weight decay leaves alone, in encoders of each backend and in decoders whose tensors hang in unusual places."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import changed, write_vision
from torch import nn
from toy_decoders import toy_decoder

from vlm.models.build import build_model
from vlm.models.config import ModelConfig
from vlm.models.decay import undecayed


def left_alone(module: nn.Module, part: str) -> set[str]:
    """The last two parts of the names of what has two axes or more and is not decayed."""
    model = nn.ModuleDict({part: module})
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return {".".join(name.split(".")[-2:]) for name in undecayed(model) if len(shapes[name]) > 1}


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("test_vit", {"vision.cls_token", "vision.pos_embed"}),
        ("eva02_tiny_patch14_224", {"vision.cls_token", "vision.pos_embed"}),
        ("swin_tiny_patch4_window7_224", {"attn.relative_position_bias_table"}),
        ("levit_128s", {"attn.attention_biases", "attn_downsample.attention_biases"}),
        ("xcit_nano_12_p16_224", {"attn.temperature", "vision.cls_token", "token_projection.weight"}),
        ("samvit_base_patch16", {"vision.pos_embed", "attn.rel_pos_h", "attn.rel_pos_w"}),
        ("convnext_atto", set()),
        ("test_resnet", set()),
    ],
)
def test_tokens_and_tables_of_timm_are_left_alone(architecture: str, expected: set[str]):
    import timm

    with torch.device("meta"):
        model = timm.create_model(architecture, num_classes=0)
    assert left_alone(model, "vision") == expected
    decayed = set(dict(model.named_parameters())) - {name[len("vision.") :] for name in undecayed_of(model)}
    assert sum(name.endswith("weight") for name in decayed) == len(decayed) > 0


def undecayed_of(model: nn.Module) -> set[str]:
    return undecayed(nn.ModuleDict({"vision": model}))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("clip_vision_model", {"position_embedding.weight"}),
        ("siglip_vision_model", {"position_embedding.weight"}),
        (
            "dinov2_with_registers",
            {"embeddings." + name for name in ("cls_token", "mask_token", "register_tokens", "position_embeddings")},
        ),
    ],
)
def test_tokens_and_tables_of_transformers_are_left_alone(tmp_path: Path, kind: str, expected: set[str]):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(write_vision(tmp_path / kind, kind))
    heads = {"probe", "in_proj_weight"}  # of SigLIP's pooling head, which no feature needs
    assert {name for name in left_alone(model, "vision") if name.rpartition(".")[2] not in heads} == expected


def test_tables_of_open_clip_are_left_alone_though_its_attention_keeps_matrices_as_parameters():
    from open_clip.transformer import VisionTransformer

    visual = VisionTransformer(28, 7, 24, 2, 2, 2.0, output_dim=8)
    assert left_alone(visual, "vision") == {"vision.positional_embedding", "vision.proj"}  # proj makes no features
    assert not any("in_proj_weight" in name for name in undecayed_of(visual))


def test_positions_and_states_of_decoders_are_left_alone_and_experts_are_not():
    expected = {
        "gpt2": {"wpe.weight"},
        "opt": {"embed_positions.weight"},
        "falcon_mamba": {"mixer.A_log"},
        "qwen3_moe": set(),
        "rwkv": {
            f"{block}.time_mix_{name}" for block in ("attention", "feed_forward") for name in ("key", "receptance")
        }
        | {"attention.time_mix_value"},
    }
    assert {kind: left_alone(toy_decoder(kind), "llm") for kind in expected} == expected


def test_a_norm_with_a_row_for_each_head_is_a_norm():
    assert left_alone(toy_decoder("cohere", use_qk_norm=True), "llm") == {"q_norm.weight", "k_norm.weight"}


def test_adapters_of_one_row_are_matrices(config: ModelConfig):
    model = build_model(changed(config, trainable=["llm.lora"], lora={"rank": 1})).model
    assert not any("lora" in name for name in undecayed(model))
