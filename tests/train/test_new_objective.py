"""An objective that only the tests know, from training to the server; test_engines_agree.py has it on every engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toy_objective import EvenWordsConfig
from walk import registered, walk

from vlm.config import load_config
from vlm.errors import CheckpointError
from vlm.objectives import OBJECTIVES
from vlm.run import train


@pytest.mark.slow
def test_it_needs_nothing_but_its_class_and_its_section(
    config_file: Any, tiny: Path, capsys: pytest.CaptureFixture[str]
):
    objective = {"kind": "even_words", "power": 1.5}
    with registered(OBJECTIVES, EvenWordsConfig):
        path = config_file(objective=objective, train__max_steps=4, train__save_every=2)
        walked = walk(path, tiny / "data/images/red-circle-0.png", capsys)
        lines = [json.loads(line) for line in (walked.run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "accuracy" in line and "doubt" in line] == [1, 2, 3, 4]
        with pytest.raises(CheckpointError, match=r"objective\.power: 1\.5 -> 2\.0"):
            train(load_config(path, ["objective.power=2.0"]), path.read_text())
