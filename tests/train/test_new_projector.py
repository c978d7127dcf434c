"""A projector that only this test knows: built, planned, trained, resumed, exported, loaded, asked, served."""

from __future__ import annotations

import base64
from typing import Any, Literal

import pytest

import vlm
from vlm.apps.api.limits import Limits
from vlm.apps.api.prompt import PromptBuilder
from vlm.apps.api.schemas import ChatRequest
from vlm.config import RunConfig, load_config
from vlm.export.run import export_run
from vlm.models.config import ModelConfig, ProjectorConfig
from vlm.models.projector import PROJECTORS, Projector
from vlm.plan.estimate import estimate
from vlm.run import train


class EverySecond(Projector):
    """Half as many tokens as patches."""

    def __init__(self, *, num_patches: int, **settings: Any) -> None:
        super().__init__(num_patches=num_patches, **settings)
        self.num_tokens = num_patches // 2

    @classmethod
    def count_tokens(cls, config, num_patches):
        return num_patches // 2

    @classmethod
    def describe(cls, config):
        return "every second patch"

    @classmethod
    def why_not_llava(cls, config):
        return "its projector takes every second patch"

    def inputs(self, features):
        return super().inputs(features[:, ::2])


@pytest.fixture
def known(monkeypatch):
    """Its line in the dict, and its name among the kinds."""

    def rebuild(*kinds: str) -> None:
        ProjectorConfig.model_fields["kind"].annotation = Literal[kinds]
        for section in (ProjectorConfig, ModelConfig, RunConfig):
            section.model_rebuild(force=True)

    monkeypatch.setitem(PROJECTORS, "every_second", EverySecond)
    rebuild("linear", "mlp", "every_second")
    yield
    rebuild("linear", "mlp")


@pytest.mark.usefixtures("known")
def test_it_needs_nothing_but_its_class(config_file, tiny, tmp_path, capsys):
    path = config_file(
        model__projector={"kind": "every_second", "normalize": True, "depth": 1},
        train__max_steps=4, train__save_every=2,
    )  # fmt: skip
    assert estimate(load_config(path)).shape.tokens_per_image == 8
    train(load_config(path, ["train.max_steps=2"]), path.read_text())
    run = train(load_config(path), path.read_text())
    assert "resuming after step 2" in capsys.readouterr().err
    export = export_run(run)
    assert "every second patch" in (export / "README.md").read_text()
    assert (export_run(run, full=True) / "llm").is_dir()  # no LLaVA layout
    loaded = vlm.load(export, device="cpu", precision="fp32")
    assert isinstance(loaded.model.projector, EverySecond)
    image = next((tiny / "data/images").glob("*.png"))
    assert isinstance(loaded.chat("What is this?", [str(image)], max_new_tokens=4), str)
    url = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
    content = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
    request = ChatRequest.model_validate({"model": "x", "messages": [{"role": "user", "content": content}]})
    (prompt,) = PromptBuilder(loaded, 1000, Limits(), "messages")(request, [image.read_bytes()])
    assert prompt.input_ids.count(loaded.image_token_id) == 8
