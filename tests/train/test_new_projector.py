"""A projector that only this test knows: built, planned, trained, resumed, exported, loaded, asked, served."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import PositiveInt
from walk import registered, walk

from vlm.config import load_config
from vlm.models.projector import Projector
from vlm.models.projector_kinds import PROJECTORS, ProjectorConfig
from vlm.plan.estimate import estimate


class EverySecond(Projector):
    """Reads every n-th patch."""

    def __init__(self, *, num_patches: int, step: int, **settings: Any) -> None:
        super().__init__(num_patches=num_patches, **settings)
        self.num_tokens = num_patches // step
        self.step = step

    def inputs(self, features):
        return super().inputs(features[:, :: self.step])


class EverySecondConfig(ProjectorConfig):
    kind: Literal["every_second"] = "every_second"
    step: PositiveInt = 2

    def build(self, **sizes):
        return EverySecond(step=self.step, normalize=self.normalize, **sizes)

    def count_tokens(self, num_patches):
        return num_patches // self.step

    def describe(self):
        return "every second patch"

    def why_not_llava(self):
        return "its projector takes every second patch"


@pytest.fixture
def known():
    with registered(PROJECTORS, EverySecondConfig):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("known")
def test_it_needs_nothing_but_its_classes(config_file, tiny, capsys):
    path = config_file(
        model__projector={"kind": "every_second", "normalize": True, "step": 2},
        train__max_steps=4, train__save_every=2,
    )  # fmt: skip
    assert estimate(load_config(path)).shape.tokens_per_image == 8
    walked = walk(path, tiny / "data/images/red-circle-0.png", capsys)
    assert "every second patch" in (walked.export / "README.md").read_text()
    assert (walked.full / "llm").is_dir()  # not the LLaVA layout
    assert isinstance(walked.loaded.model.projector, EverySecond)
    assert walked.prompt.count(walked.loaded.image_token_id) == 8
