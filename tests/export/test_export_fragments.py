"""An export is the same whichever engine wrote the checkpoint: names, shapes and values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_export import model_config, write_picture

from vlm.export.load import load
from vlm.export.pth import export_pth
from vlm.train.checkpoint import newest_verified

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ENGINES = {  # options and processes
    "local": (["engine.kind=local"], 1),
    "ddp": (["engine.kind=ddp"], 2),
    "zero2": (["engine.kind=zero", "engine.stage=2"], 2),
    "zero3": (["engine.kind=zero", "engine.stage=3"], 2),
    "fsdp": (["engine.kind=fsdp"], 2),
    "pipeline": (["engine.kind=pipeline", "engine.num_stages=2"], 2),
}
VARIANTS = {
    "adapters": {"lora": {"rank": 4, "alpha": 8}, "trainable": ["projector", "llm.lora"]},
    "everything": {"lora": None, "trainable": ["projector", "llm", "vision"]},
}
# The largest difference of a weight after one step of rate 0.1; worst seen 0 for adapters, 3e-8 for everything.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    records = []
    for number in range(6):
        write_picture(folder / f"{number}.png", seed=number)
        answer = "A red square. " * (1 + number % 3)
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": answer}]
        records.append({"image": f"{number}.png", "conversations": turns})
    (folder / "records.json").write_text(json.dumps(records))
    return folder


def write_config(folder: Path, data: Path, changes: dict) -> Path:
    """SGD-like: with its large epsilon in the way of nothing, AdamW's first update would hide small differences."""
    model = model_config(folder, **changes)
    values = {
        "output_dir": "???",
        "model": model.model_dump(mode="json"),
        "data": {
            "template": "chatml", "max_length": 96, "cache": str(folder / "cache"),
            "sources": [{"path": str(data / "records.json"), "images": str(data)}],
        },
        "train": {
            "max_steps": 1, "global_batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-3, "precision": "fp32",
        },
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(json.dumps(values))
    return path


def vlm(*arguments: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vlm.cli.main", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def tensors(export: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an export, by file and name."""
    found = {}
    for file in sorted(export.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                found[f"{file.relative_to(export)}: {name}"] = opened.get_tensor(name)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_exports_of_all_engines_after_one_step_are_equal(variant, data, tmp_path):
    path = write_config(tmp_path, data, VARIANTS[variant])
    exports, files = {}, {}
    for name, (options, nproc) in ENGINES.items():
        run = tmp_path / name
        chosen = [part for option in (*options, f"output_dir={run}") for part in ("--options", option)]
        vlm("train", path, "--nproc", nproc, *chosen)
        vlm("export", run)
        exports[name] = tensors(run / "export")
        files[name] = torch.load(export_pth(run), weights_only=True)
        shards = list((newest_verified(run) / "weights").iterdir())
        assert len(shards) == (1 if name in ("local", "ddp") else 2)
    expected = exports["local"]
    assert len(expected) >= 16
    for name, found in exports.items():
        assert found.keys() == expected.keys(), name
        for key, tensor in found.items():
            assert (tensor.shape, tensor.dtype) == (expected[key].shape, expected[key].dtype), (name, key)
            assert (tensor - expected[key]).abs().max() <= TOLERANCE, (name, key)
        assert files[name].keys() == files["local"].keys(), name
    sizes = {sum(tensor.nbytes for tensor in found.values()) for found in exports.values()}
    assert len(sizes) == 1
    model = load(tmp_path / "pipeline/export", device="cpu", precision="fp32")
    assert model.chat("What is this?", [data / "0.png"], max_new_tokens=4) is not None
