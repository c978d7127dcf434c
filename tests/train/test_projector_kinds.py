"""A resampler, and a frozen Q-Former from a BLIP-2 file: planned, trained, resumed, exported, loaded, asked, served."""

from __future__ import annotations

import pytest
import torch
from walk import walk

from vlm.cli.train import start_training
from vlm.config import load_config
from vlm.config_checks import config_problems
from vlm.errors import CheckpointError
from vlm.export.run import export_run
from vlm.models.qformer import BLIP2_PTH
from vlm.plan.estimate import estimate
from vlm.run import train
from vlm.train.checkpoint import newest_verified
from vlm.train.fragments import read_weights

SMALL = {"num_tokens": 6, "num_blocks": 2, "width": 24, "num_heads": 4}


@pytest.fixture
def blip2(config_file, tmp_path):
    """A file of BLIP-2's layout for the tiny encoder, and a config that begins with it and trains the linear layer."""
    settings = {"kind": "qformer", **SMALL}
    config = load_config(config_file(model__projector=settings))
    torch.manual_seed(7)
    width = estimate(config).shape.vision.width
    projector = config.model.projector.build(num_patches=16, in_width=width, out_width=64, output_std=1.0)
    kept = {name: each for name, each in projector.state_dict().items() if not name.startswith("layers.")}
    file = tmp_path / "blip2.pth"
    torch.save({"model": dict(BLIP2_PTH.from_ours(kept))}, file)
    frozen = {**settings, "pretrained": str(file), "frozen": True}
    return file, kept, {"model__projector": frozen, "train__max_steps": 4, "train__save_every": 2}


@pytest.mark.slow
def test_a_resampler_needs_no_other_change(config_file, tiny, capsys):
    projector = {"kind": "resampler", **SMALL}
    path = config_file(model__projector=projector, train__max_steps=4, train__save_every=2)
    assert estimate(load_config(path)).shape.tokens_per_image == 6
    walked = walk(path, tiny / "data/images/red-circle-0.png", capsys)
    assert "resampler, 6 tokens an image" in walked.card
    assert (walked.full / "llm").is_dir()  # not the LLaVA layout
    assert walked.prompt.count(walked.loaded.image_token_id) == 6


@pytest.mark.thorough
@pytest.mark.slow
def test_of_a_frozen_qformer_the_linear_layer_trains_and_the_export_has_all(blip2, config_file, tiny, capsys, tmp_path):
    file, kept, changes = blip2
    path = config_file(**changes)
    planned = estimate(load_config(path))
    walked = walk(path, tiny / "data/images/red-circle-0.png", capsys)
    exported = walked.loaded.model.projector
    assert all(torch.equal(exported.get_parameter(name), each) for name, each in kept.items())
    saved = [name for name in read_weights(newest_verified(walked.run)) if name.startswith("projector.")]
    assert {name.split(".")[1] for name in saved} == {"layers"}
    shape = planned.shape.projector
    assert shape.trainable == sum(each.numel() for each in exported.layers.parameters())
    assert shape.numel - shape.trainable == sum(each.numel() for each in kept.values())
    changes |= {"init_from": str(walked.export), "output_dir": str(tmp_path / "second")}
    second = config_file("second.yaml", **changes)
    start_training(str(second), ["model.projector.frozen=false", "train.max_steps=1"])
    thawed = export_run(tmp_path / "second")
    assert (thawed / "projector.safetensors").stat().st_size == (walked.export / "projector.safetensors").stat().st_size
    torch.save({"model": {}}, file)
    with pytest.raises(CheckpointError, match=r"model\.projector\.pretrained .*blip2\.pth: blip2\.pth: \w+ -> \w+"):
        train(load_config(path, ["train.max_steps=6"]), path.read_text())


@pytest.mark.slow
def test_a_file_that_is_not_there_or_does_not_fit_is_named(blip2, config_file):
    file, kept, changes = blip2
    path = config_file(**changes)
    with pytest.raises(CheckpointError, match=r"projector\.queries: \[1, 6, 24\] -> \[1, 5, 24\]"):
        train(load_config(path, ["model.projector.num_tokens=5"]), path.read_text())
    torch.save({"model": dict(BLIP2_PTH.from_ours({"queries": kept["queries"]}))}, file)
    with pytest.raises(CheckpointError, match=r"projector\.norm\.bias: missing"):
        train(load_config(path), path.read_text())
    file.unlink()
    assert [key for key, _ in config_problems(load_config(path))] == [("model", "projector", "pretrained")]
