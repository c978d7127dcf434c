"""A toy that looks: trained to name the colour of a square, which only the image tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_export import write_clip, write_llm

COLORS = {
    "red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 230), "yellow": (240, 220, 20),
    "black": (10, 10, 10), "white": (250, 250, 250), "purple": (150, 30, 170), "grey": (128, 128, 128),
}  # fmt: skip
PROMPT = "Which colour?"


def write_squares(folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Images of one colour each with some noise, as records {"image", "prompt", "answer"}."""
    draw = np.random.default_rng(seed)
    records = []
    for number in range(count):
        name = [*COLORS][number % len(COLORS)]
        pixels = np.asarray(COLORS[name]) + draw.normal(0, 12, (28, 28, 3))
        image = f"{seed}-{number}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / image)
        records.append({"image": image, "prompt": PROMPT, "answer": name})
    return records


@pytest.fixture(scope="session")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: config.yaml, run/export, and test.jsonl of images that it never saw."""
    from vlm.config import load_config
    from vlm.export.run import export_run
    from vlm.run import train

    root = tmp_path_factory.mktemp("seeing")
    write_clip(root / "clip")
    write_llm(root / "llm")
    for name, count, seed in (("train", 64, 1), ("test", 48, 2)):
        lines = map(json.dumps, write_squares(root, count, seed))
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    task = {"name": "colour", "kind": "generate", "path": str(root / "test.jsonl"), "max_new_tokens": 8}
    settings = {
        "output_dir": str(root / "run"),
        "model": {
            "vision": {"backend": "hf", "path": str(root / "clip"), "layer": -2},
            "projector": {"kind": "linear", "normalize": True},
            "llm": {"path": str(root / "llm")},
            "trainable": ["projector", "llm"],
        },
        "data": {
            "template": "chatml", "sources": [{"path": str(root / "train.jsonl")}], "held_out": 0,
            "cache": str(root / "cache"), "max_length": 128,
        },
        "train": {
            "max_steps": 60, "global_batch_size": 4, "micro_batch_size": 4, "learning_rate": 5e-3,
            "precision": "fp32", "prove": False, "save_every": 1000, "log_level": "warning",
        },
        "evaluation": {"tasks": [{**task, "metrics": ["exact_match"], "gate": {"over_shuffled": 0.5}}]},
    }  # fmt: skip
    (root / "config.yaml").write_text(json.dumps(settings))
    train(load_config(root / "config.yaml"), json.dumps(settings))
    export_run(root / "run")
    return root
