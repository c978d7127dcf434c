"""Shapes read from config files are those of the model that would be built."""

from __future__ import annotations

import pytest
from conftest_plan import changed
from meta_models import build_on_meta

from vlm.plan.estimate import estimate
from vlm.plan.shapes import read_shapes


def test_the_tiny_decoder_by_hand(shape):
    q, k, v, o = 8 * 8 + 8, 8 * 4 + 4, 8 * 4 + 4, 8 * 8
    block = q + k + v + o + 3 * 8 * 16 + 2 * 8  # gate, up, down; two norms
    assert (shape.width, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (8, 2, 1, 4)
    assert (shape.intermediate, shape.vocab, shape.is_gated, shape.has_head_norms) == (16, 32, True, False)
    assert (shape.embedding, shape.head, shape.final_norm, shape.blocks) == (256, 256, 8, (block, block))
    assert block == 608


def test_encoder_and_projector_by_hand(config):
    shape = read_shapes(config.model)
    assert (shape.vision.num_patches, shape.vision.num_tokens, shape.vision.num_blocks) == (16, 17, 2)  # layer -2 of 3
    assert (shape.vision.width, shape.vision.intermediate, shape.vision.activation_copies) == (12, 24, 2)
    assert shape.projector.numel == shape.projector.trainable == (12 + 1) * 8 + (8 + 1) * 8
    assert shape.tokens_per_image == 16


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"trainable": ("projector", "llm")},
        {"trainable": ("projector", "llm.lora"), "lora": {"rank": 3}},
        {"trainable": ("llm.lora",), "lora": {"rank": 2, "targets": ("q_proj", "down_proj")}},
    ],
)
def test_numbers_of_parameters_are_those_of_the_model_on_the_meta_device(model, config):
    config = changed(config, model=model)
    built, plan = build_on_meta(config.model), estimate(config)
    assert plan.num_parameters == sum(p.numel() for p in built.parameters())
    assert plan.num_trained == sum(p.numel() for p in built.parameters() if p.requires_grad)


def test_a_tied_head_has_no_weights_of_its_own(config):
    import json
    from pathlib import Path

    path = Path(config.model.llm.path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    assert read_shapes(config.model).llm.head == 0
