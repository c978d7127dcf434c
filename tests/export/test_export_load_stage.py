"""An export starts the stages of a pipeline as it starts a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_export import model_config, write_llm, write_run

from vlm.artifacts.initial import load_init
from vlm.errors import CheckpointError
from vlm.export.run import export_run
from vlm.models.build import build_model
from vlm.models.pipeline_build import build_stage

PROJECTOR = {"trainable": ["projector"], "lora": None}
ADAPTERS = {"trainable": ["projector", "llm.lora"]}
FULL = {"trainable": ["projector", "llm"], "lora": None}
VISION = {"trainable": ["projector", "vision"], "lora": None}


@pytest.mark.one_in(10)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "now"),
    [(PROJECTOR, ADAPTERS), (ADAPTERS, ADAPTERS), (ADAPTERS, FULL), (ADAPTERS, PROJECTOR), (FULL, ADAPTERS),
     (FULL, FULL), (VISION, ADAPTERS), (VISION, VISION)],
    ids=lambda changes: "+".join(changes["trainable"]),
)  # fmt: skip
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_stage_gets_what_the_whole_model_gets(tmp_path: Path, before: Any, now: Any, tied: bool):
    write_llm(tmp_path / "llm", tied=tied)
    write_run(tmp_path / "run", model_config(tmp_path, **before))
    export = export_run(tmp_path / "run")
    config = model_config(tmp_path, **now)
    whole = build_model(config, seed=2).model
    report = load_init(whole, config, export)
    expected = dict(whole.named_parameters(remove_duplicate=False)) | dict(whole.named_buffers())
    found = set()
    for number in range(3):
        stage = build_stage(config, (1, 3), number, seed=2)
        assert load_init(stage, config, export) == report
        own = stage.built.model
        for name, tensor in (*own.named_parameters(), *own.named_buffers()):
            assert torch.equal(tensor, expected[name]), name
            assert tensor.requires_grad == expected[name].requires_grad
            found.add(name)
    assert found == expected.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"lora": {"rank": 8, "alpha": 8}}, r"model\.lora\.rank: 4 -> 8"),
        ({"lora": {"rank": 4, "alpha": 16}}, r"model\.lora\.alpha: 8 -> 16"),
        ({"projector": {"kind": "linear"}}, r"projector\.feature_mean: \[32\] -> not in the model"),
    ],
)
def test_what_does_not_fit_is_refused_on_every_stage(tmp_path: Path, now: Any, message: str):
    write_run(tmp_path / "run", model_config(tmp_path))
    export = export_run(tmp_path / "run")
    config = model_config(tmp_path, **now)
    for number in range(2):
        with pytest.raises(CheckpointError, match=message):
            load_init(build_stage(config, (1,), number), config, export)


@pytest.mark.slow
def test_another_language_model_is_noticed_on_every_stage(tmp_path: Path):
    write_run(tmp_path / "run", model_config(tmp_path))
    export = export_run(tmp_path / "run")
    config = model_config(tmp_path, llm={"path": str(write_llm(tmp_path / "other", seed=9))})
    for number in range(2):
        with pytest.raises(CheckpointError, match="trained beside another language model"):
            load_init(build_stage(config, (1,), number), config, export)
