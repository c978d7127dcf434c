"""A model that does not use its images is found out, whatever the cause, by the gate that the seeing one passes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlm.cli.main import app
from vlm.cli.process import run
from vlm.config import RunConfig, load_config
from vlm.errors import ConfigError, GateFailed
from vlm.evaluation.gate import gate_problems
from vlm.evaluation.metrics import Figure
from vlm.evaluation.report import measure
from vlm.evaluation.rows import Row
from vlm.evaluation.task_kinds import GateConfig, LossTask
from vlm.inference.load import LoadedModel, load
from vlm.models.build import build_model


@pytest.fixture(scope="module")
def config(seeing: Path) -> RunConfig:
    return load_config(seeing / "config.yaml")


@pytest.fixture
def loaded(seeing: Path) -> LoadedModel:
    return load(seeing / "run/export", device="cpu", precision="fp32")


@pytest.mark.slow
def test_the_seeing_model_passes(seeing: Path, config: RunConfig, loaded: LoadedModel):
    (result,) = measure(loaded, config.evaluation, seeing / "cache")
    (row,) = result.rows
    assert (row.own.value, result.problems) == (1.0, [])
    assert row.shuffled is not None
    assert row.blank is not None
    assert max(row.shuffled.value, row.blank.value) <= 0.25  # both 0.125 when it was written, the majority
    assert (row.baseline, row.baseline_name) == (0.125, "majority")


def encode(loaded: LoadedModel, change: Callable[[Tensor], Tensor]) -> LoadedModel:
    """Every batch of image features [N, T, D] as `change` makes it."""
    encode_images = loaded.model.encode_images
    loaded.model.encode_images = lambda pixels: change(encode_images(pixels))  # type: ignore[method-assign]
    return loaded


def projector_not_loaded(loaded: LoadedModel, config: RunConfig) -> LoadedModel:
    torch.manual_seed(9)
    for module in loaded.model.projector.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    return loaded


def zero_features(loaded: LoadedModel, config: RunConfig | None) -> LoadedModel:
    return encode(loaded, torch.zeros_like)


def wrong_mean_and_std(loaded: LoadedModel, config: RunConfig) -> LoadedModel:
    """Of values up to 255, where the pixels are up to 1."""
    wrong = replace(loaded.image_spec, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
    return replace(loaded, image_spec=wrong)


def wrong_layer(loaded: LoadedModel, config: RunConfig) -> LoadedModel:
    vision = config.model.vision.model_copy(update={"layer": -1})
    other = build_model(config.model.model_copy(update={"vision": vision})).model
    loaded.model.vision = other.vision.eval()
    return loaded


def tokens_of_another_image(loaded: LoadedModel, config: RunConfig) -> LoadedModel:
    return encode(loaded, lambda features: features.roll(1, 0))


def untrained_projector(loaded: LoadedModel, config: RunConfig) -> LoadedModel:
    """That of the run before its first step, beside the language model that was trained."""
    start = build_model(config.model, seed=config.seed).model.projector
    trained = dict(loaded.model.projector.named_parameters())
    with torch.no_grad():
        for name, parameter in start.named_parameters():
            trained[name].copy_(parameter)
    return loaded


BLINDNESSES = (
    projector_not_loaded, zero_features, wrong_mean_and_std, wrong_layer, tokens_of_another_image, untrained_projector,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("blind", BLINDNESSES, ids=lambda blind: blind.__name__)
def test_a_planted_blindness_is_caught(
    blind: Callable[[LoadedModel, RunConfig], LoadedModel], seeing: Path, config: RunConfig, loaded: LoadedModel
):
    (result,) = measure(blind(loaded, config), config.evaluation, seeing / "cache")
    (problem,) = result.problems
    assert "colour, exact match: own images 0." in problem
    assert "the gate demands 0.5" in problem


@pytest.mark.slow
def test_vlm_eval_writes_its_figures_and_ends_with_6(
    seeing: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setattr(
        "vlm.evaluation.report.load", lambda *args, **kwargs: zero_features(load(*args, **kwargs), None)
    )
    command = ["eval", str(seeing / "config.yaml"), "--out", str(tmp_path)]
    assert run(lambda: app(command, standalone_mode=False)) == 6
    assert "the model does not pass 1 gate:\n  colour, exact match" in capsys.readouterr().err
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["results"][0]["own"] == written["results"][0]["shuffled"]
    assert len(written["failed_gates"]) == 1


def row(own: float, shuffled: float | None, error: float = 0.01) -> list[Row]:
    other = None if shuffled is None else Figure(shuffled, error, 9)
    return [Row("talk", "loss", "loss per token", Figure(own, error, 9), other, None, None, "")]


@pytest.mark.parametrize(
    ("gate", "rows", "problem"),
    [
        ({"over_shuffled": 0.3}, row(1.0, 1.5), None),
        ({"over_shuffled": 0.3}, row(1.0, 1.2), "better by 0.200, the gate demands 0.3"),
        ({"over_shuffled": 0.3}, row(1.0, 1.5, error=0.2), "which is within 2 standard errors .* more records"),
        ({"over_shuffled": 0.3}, row(1.0, None), "no shuffled images to compare with"),
        ({"over_blank": 0.3}, row(1.0, 1.5), "no blank images to compare with"),
        ({"own": 0.9}, row(1.0, 1.5), r"own images 1\.000 ± 0\.010, the gate demands at most 0\.9"),
        ({"own": 1.1}, row(1.0, 1.5), None),
    ],
)
def test_of_a_loss_less_is_better(gate: dict[str, Any], rows: list[Row], problem: str | None):
    task = LossTask(name="talk", path="x", gate=GateConfig(**gate))
    found = gate_problems(task, rows)
    assert len(found) == (problem is not None)
    assert problem is None or re.search(problem, found[0])


def test_a_gate_on_a_figure_that_is_not_there_is_refused():
    task = LossTask(name="talk", path="x", gate=GateConfig(own=1, figure="F1"))
    with pytest.raises(ConfigError, match=r"gate\.figure F1: the task has loss per token"):
        gate_problems(task, row(1.0, 1.5))
    assert GateFailed.exit_code == 6
