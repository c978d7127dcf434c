"""An encoder that only this test knows, whose network is of no library: from build to serve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from walk import named, train_and_resume, walk

from vlm.artifacts.pins import pin_start
from vlm.config import RunConfig, load_config
from vlm.config_checks import config_problems
from vlm.errors import CheckpointError
from vlm.models.config import ModelConfig, VisionConfig
from vlm.models.encoders.base import EncoderCost, VisionBackend
from vlm.models.encoders.kinds import VISION_BACKENDS
from vlm.models.vision import VisionEncoder
from vlm.plan.estimate import estimate
from vlm.run import train

SHAPE = "strips.json"


class Strips(nn.Module):
    """The mean colour of each of four strips, made wider: [N, 3, S, S] -> [N, 4, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Linear(3, width)

    def forward(self, pixel_values):
        strips = pixel_values.unflatten(2, (4, -1)).mean((3, 4))  # [N, 3, 4]
        return self.read(strips.transpose(1, 2)).tanh()


class StripsBackend(VisionBackend):
    settings = (SHAPE,)

    def build(self, config, dtype, weights):
        folder = Path(config.path)
        trunk = Strips(json.loads((folder / SHAPE).read_text())["width"])
        if weights:
            load_model(trunk, folder / "model.safetensors")
        return VisionEncoder(trunk, image_size=config.image_size or 56, mean=(0.5,) * 3, std=(0.5,) * 3)

    def save_architecture(self, encoder, config, folder):
        (folder / SHAPE).write_text(json.dumps({"width": encoder.width}))
        return config.model_copy(update={"path": folder.name})

    def cost(self, encoder):
        return EncoderCost(num_tokens=4, num_blocks=1, block_width=3, intermediate=encoder.width, activation_copies=1)

    def describe(self, config):
        return "mean colours of four strips"

    def problems(self, config, reads):
        if not (Path(config.path) / SHAPE).is_file():
            yield f"{config.path} holds no {SHAPE}"


@pytest.fixture
def known(monkeypatch):
    """Its line in the dict, and its name among the backends."""
    monkeypatch.setitem(VISION_BACKENDS, "strips", StripsBackend())
    with named("strips", "backend", VisionConfig, ModelConfig, RunConfig):
        yield


@pytest.fixture
def config(known, config_file, tmp_path):
    """Trains four steps with an encoder 24 wide, and saves after two."""
    folder = tmp_path / "strips"
    folder.mkdir()
    (folder / SHAPE).write_text('{"width": 24}')
    torch.manual_seed(0)
    save_model(Strips(24), folder / "model.safetensors")

    def write(*trainable: str) -> Path:
        vision = {"backend": "strips", "path": str(folder)}
        changes = {"model__vision": vision, "model__trainable": list(trainable)}
        return config_file(train__max_steps=4, train__save_every=2, **changes)

    return write


def test_it_is_checked_and_planned_by_what_it_says(config, tmp_path):
    checked = load_config(config("projector", "llm.lora"))
    assert config_problems(checked) == []
    shape = estimate(checked).shape
    assert shape.tokens_per_image == 4
    assert (shape.vision.numel, shape.vision.intermediate, shape.vision.num_tokens) == (4 * 24, 24, 4)
    (tmp_path / "strips" / SHAPE).unlink()
    ((key, problem),) = config_problems(checked)
    assert (key, problem) == (("model", "vision", "path"), f"{tmp_path}/strips holds no {SHAPE}")


@pytest.mark.one_in(2)
@pytest.mark.slow
@pytest.mark.parametrize("trains_too", [(), ("vision",)], ids=["frozen", "trained"])
def test_it_needs_nothing_but_its_class(config, tiny, capsys, trains_too):
    path = config("projector", "llm.lora", *trains_too)
    walked = walk(path, tiny / "data/images/red-circle-0.png", capsys)
    assert "mean colours of four strips" in (walked.export / "README.md").read_text()
    assert json.loads((walked.full / "vision" / SHAPE).read_text()) == {"width": 24}
    assert (walked.full / "llm").is_dir()  # not the LLaVA layout
    assert isinstance(walked.loaded.model.vision.trunk, Strips)
    assert walked.prompt.count(walked.loaded.image_token_id) == 4


@pytest.mark.slow
def test_a_resume_sees_that_its_files_were_replaced(config, tmp_path, capsys):
    path = config("projector", "llm.lora")
    assert pin_start(load_config(path).model, None)["model.vision.path"].keys() == {SHAPE, "model.safetensors"}
    train_and_resume(path, capsys)
    save_model(Strips(24), tmp_path / "strips/model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.vision\.path .*strips: model\.safetensors: \w+ -> \w+"):
        train(load_config(path, ["train.max_steps=6"]), path.read_text())
