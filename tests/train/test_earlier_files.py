"""A run, its checkpoint and its export, as version 0.1 wrote them before the packages were split: they still work.

`tests/fixtures/earlier` has tiny base models, records, config, the checkpoint after two of four steps, an export, and
what that version made of them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import toy_objective

import vlm
from vlm.config import load_config
from vlm.errors import CheckpointError
from vlm.run import train

EARLIER = Path(__file__).parents[1] / "fixtures/earlier"


@pytest.fixture
def expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """What the earlier version found; the working directory is a copy of its files."""
    shutil.copytree(EARLIER, tmp_path / "earlier")
    monkeypatch.chdir(tmp_path / "earlier")
    return json.loads(Path("expected.json").read_text())


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint_with_the_losses_it_would_have_had(expected, capsys):
    run = train(load_config("config.yaml"), Path("config.yaml").read_text())
    assert "resuming after step 2" in capsys.readouterr().err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4]
    assert [line["loss"] for line in lines] == pytest.approx(expected["losses"][2:], rel=1e-5)  # worst seen 0
    assert [line["grad_norm"] for line in lines] == pytest.approx(expected["grad_norms"][2:], rel=1e-4)


def test_another_objective_is_refused(expected):
    toy_objective.register()
    try:
        config = load_config("config.yaml", ["objective={kind: even_words}"])
        with pytest.raises(CheckpointError, match=r"objective\.kind"):
            train(config, Path("config.yaml").read_text())
    finally:
        toy_objective.unregister()


def test_its_export_answers_as_it_did(expected):
    model = vlm.load("run/export", device="cpu", precision="fp32")
    assert model.chat("What is this?", ["0.png"], max_new_tokens=8) == expected["answer"]


@pytest.mark.slow
def test_the_next_stage_begins_with_its_export(expected):
    shutil.rmtree("run/checkpoints")
    config = load_config("config.yaml", ["init_from=run/export", "output_dir=next", "train.max_steps=1"])
    train(config, Path("config.yaml").read_text())
    loss = json.loads(Path("next/metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert loss < expected["losses"][0]
