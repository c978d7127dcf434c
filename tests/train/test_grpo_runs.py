"""Runs whose model learns from replies that it wrote itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def lines_of(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@pytest.fixture
def asked(config_file: Any, tiny: Path, tmp_path: Path):
    """Writes a config whose records ask for the color of an image, red or blue."""
    kinds = [(color, shape, n) for n in range(4) for shape in ("circle", "square") for color in ("red", "blue")]
    lines = [{"image": f"{c}-{s}-{n}.png", "prompt": "Color?", "answer": c} for c, s, n in kinds]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"path": str(tmp_path / "asked.jsonl"), "images": str(tiny / "data/images")}

    def write(objective: dict[str, Any], **changes: Any) -> Path:
        section = {"kind": "grpo", "group_size": 4, "max_new_tokens": 4} | objective
        settings = {"data__held_out": 0.0, "data__max_length": 64, "train__log_every": 1, "train__save_every": 100}
        return config_file(objective=section, data__sources=[source], **settings | changes)

    return write
