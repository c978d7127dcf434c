"""Two encoders fused: planned, trained, resumed, exported, loaded, asked, served; frozen over a cache, and trained."""

from __future__ import annotations

import json

import pytest
import torch
from walk import walk

from vlm.artifacts.pins import pin_start
from vlm.config import load_config
from vlm.config_checks import config_problems
from vlm.models.build import build_model
from vlm.plan.estimate import estimate


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A folder of DINOv2: 20 pixels, 25 patches of 4."""
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("fused") / "dino"
    torch.manual_seed(1)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=20, patch_size=4, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(config_file, tiny, dino):
    def write(**changes):
        also = [{"backend": "hf", "path": dino, "layer": [-1, -2], "resize": "squash"}]
        vision = {"backend": "hf", "path": str(tiny / "encoder"), "layer": -2, "fuse_with": also}
        return config_file(model__vision=vision, train__max_steps=4, train__save_every=2, **changes)

    return write


def test_every_command_looks_at_all_encoders(config, dino):
    checked = load_config(config())
    assert config_problems(checked) == []
    plan = estimate(checked)
    built = build_model(checked.model).model
    assert plan.num_parameters == sum(p.numel() for p in built.parameters())
    first, second = plan.shape.vision.members
    assert (plan.shape.vision.width, plan.shape.vision.num_patches) == (first.width + second.width, first.num_patches)
    assert (second.width, second.num_patches, second.num_tokens) == (48, 25, 26)
    assert {"model.vision.path", "model.vision.fuse_with.0.path"} <= pin_start(checked.model, None).keys()
    elsewhere = load_config(config(), ["model.vision.fuse_with=[{backend: hf, path: ./gone}]"])
    ((key, _),) = config_problems(elsewhere)
    assert key == ("model", "vision", "fuse_with", 0, "path")


@pytest.mark.parametrize(
    "tuning",
    [
        {"model__trainable": ["vision"], "model__partial": {"vision": {"last_blocks": 1}}},
        {"model__trainable": ["vision.lora"], "model__vision_lora": {"rank": 2}},
    ],
)
def test_of_each_encoder_the_last_block_trains_or_adapters_do(config, tuning):
    checked = load_config(config(**tuning))
    built, plan = build_model(checked.model).model, estimate(checked)
    trained = {name: p.numel() for name, p in built.named_parameters() if p.requires_grad}
    by_tower = [sum(n for name, n in trained.items() if f"towers.{number}." in name) for number in (0, 1)]
    assert by_tower == [each.trained for each in plan.shape.vision.members]
    assert min(by_tower) > 0
    assert plan.num_trained == sum(by_tower)


@pytest.mark.slow
def test_frozen_encoders_need_no_other_change(config, tiny, dino, capsys):
    walked = walk(config(data__cache_features=True), tiny / "data/images/red-circle-0.png", capsys)
    assert "fused by channel with dino (hf), 20 x 20 pixels (squash)" in walked.card
    written = json.loads((walked.export / "vlm.json").read_text())
    assert written["base"].keys() == {"llm", "vision", "vision.fuse_with.0"}
    assert [each["size"] for each in written["image_spec"]["others"]] == [20]
    (pixels,) = [
        each for each in json.loads((walked.run / "proof.json").read_text())["checks"] if each["name"] == "pixels"
    ]
    assert 0 < pixels["measured"] < 0.01  # cached in bf16, against both encoders
    assert (walked.full / "llm").is_dir()  # not the LLaVA layout
    assert {folder.name for folder in walked.full.glob("vision*/")} == {"vision", "vision-1"}
    assert json.loads((walked.full / "vision-1/preprocessor_config.json").read_text())["size"] == {
        "height": 20,
        "width": 20,
    }


@pytest.mark.thorough
@pytest.mark.slow
def test_trained_encoders_need_no_other_change(config, tiny, capsys):
    path = config(model__trainable=["projector", "llm.lora", "vision"], model__gradient_checkpointing=True)
    walked = walk(path, tiny / "data/images/red-circle-0.png", capsys)
    names = {name.split(".")[2] for name, _ in walked.loaded.model.vision.named_parameters()}
    assert names == {"0", "1"}
    changed = [
        max((walked.loaded.model.vision.get_parameter(name) - each).abs().max().item() for name, each in part)
        for part in _by_encoder(load_config(path))
    ]
    assert min(changed) > 1e-4


def _by_encoder(config):
    """The named parameters that each encoder began with."""
    vision = build_model(config.model).model.vision
    return [[(n, p) for n, p in vision.named_parameters() if n.startswith(f"trunk.towers.{i}.")] for i in range(2)]
