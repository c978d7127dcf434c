"""A projector that only this test knows: built, planned, trained, resumed, exported, loaded, asked, served."""

from __future__ import annotations

from typing import Any

import pytest
from walk import named, walk

from vlm.config import RunConfig, load_config
from vlm.models.config import ModelConfig, ProjectorConfig
from vlm.models.projector import PROJECTORS, Projector
from vlm.plan.estimate import estimate


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
    monkeypatch.setitem(PROJECTORS, "every_second", EverySecond)
    with named("every_second", "kind", ProjectorConfig, ModelConfig, RunConfig):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("known")
def test_it_needs_nothing_but_its_class(config_file, tiny, capsys):
    path = config_file(
        model__projector={"kind": "every_second", "normalize": True, "depth": 1},
        train__max_steps=4, train__save_every=2,
    )  # fmt: skip
    assert estimate(load_config(path)).shape.tokens_per_image == 8
    walked = walk(path, tiny / "data/images/red-circle-0.png", capsys)
    assert "every second patch" in (walked.export / "README.md").read_text()
    assert (walked.full / "llm").is_dir()  # not the LLaVA layout
    assert isinstance(walked.loaded.model.projector, EverySecond)
    assert walked.prompt.count(walked.loaded.image_token_id) == 8
