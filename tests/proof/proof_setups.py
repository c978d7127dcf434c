"""Runs of a tiny model that have not begun, each made once: what proofs look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from demo.tiny import write_data, write_encoder, write_llm

from vlm.config import load_config
from vlm.prepare import Prepared, prepare_run

LORA = {"trainable": ["projector", "llm.lora"], "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
# name -> what differs from projector + adapters on conversations; {root} is the folder of the tiny parts
SETUPS: dict[str, dict[str, Any]] = {
    "lora": {},
    "projector": {"model": {"trainable": ["projector"], "lora": None}},
    "full": {"model": {"trainable": ["projector", "llm"], "lora": None}},
    "plain": {"model": {"trainable": ["projector"], "lora": None}, "data": {"template": "plain"}},
    "system": {"data": {"system": "Be brief and say what you see."}},
    "begin token": {"model": {"llm": {"path": "{root}/llm-bos"}}, "data": {"template": "internlm2"}},
    "batch norm": {"model": {"vision": {"backend": "timm", "path": "{root}/resnet", "image_size": 64}}},
    "second stage": {"init_from": "{root}/export"},
    "cached features": {"data": {"cache_features": True}},
    "several images": {"data": {"sources": [{"path": "{root}/several.jsonl", "images": "{root}/data/images"}]}},
    "text": {
        "model": {"vision": None, "trainable": ["llm"], "lora": None},
        "data": {"sources": [{"path": "{root}/talk.jsonl"}]},
    },
}


@pytest.fixture(autouse=True)
def no_hurry(monkeypatch) -> None:
    """A machine that is busy with other tests leaves no check out."""
    monkeypatch.setattr("vlm.proof.prove.LEAST_SECONDS", 1000.0)


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """Folder with a tiny language model, encoders and data."""
    from vlm.compat import prepare as prepare_libraries

    prepare_libraries()
    folder = tmp_path_factory.mktemp("proof")
    write_llm(folder / "llm", write_data(folder / "data"))
    write_encoder(folder / "encoder")
    _write_llm_with_begin_token(folder)
    _write_more_data(folder)
    return folder


@pytest.fixture(scope="session")
def parts_of(root):
    """Setup name -> `Prepared`, built when first asked for."""
    built: dict[str, Prepared] = {}

    def get(name: str) -> Prepared:
        if name not in built:
            built[name] = make_parts(root, name)
        return built[name]

    return get


def make_parts(root: Path, name: str, **changes: Any) -> Prepared:
    config = load_config(write_config(root, name, **changes))
    torch.manual_seed(0)
    return prepare_run(config, torch.device("cpu"))


def write_config(root: Path, name: str, **changes: Any) -> Path:
    if name == "batch norm" and not (root / "resnet").exists():
        _write_resnet(root / "resnet")
    if name == "second stage" and not (root / "export").exists():
        _write_export(root)
    values: dict[str, Any] = {
        "output_dir": f"{root}/run",
        "seed": 3,
        "model": {
            "vision": {"backend": "hf", "path": "{root}/encoder", "layer": -2},
            "projector": {"kind": "linear", "normalize": True},
            "llm": {"path": "{root}/llm"},
            **LORA,
        },
        "data": {
            "template": "chatml",
            "sources": [{"path": "{root}/data/finetune.jsonl", "images": "{root}/data/images"}],
            "cache": "{root}/cache",
            "max_length": 160,
        },
        "train": {"max_steps": 3, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"},
        "engine": {"device": "cpu"},
    }
    for section in (SETUPS[name], changes):
        for key, value in section.items():
            values[key] = {**values[key], **value} if isinstance(value, dict) else value
    path = root / f"{name.replace(' ', '-')}.yaml"
    path.write_text(json.dumps(values).replace("{root}", str(root)))
    return path


def _write_llm_with_begin_token(folder: Path) -> None:
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(folder / "llm", folder / "llm-bos")
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder / "llm-bos")


def _write_more_data(folder: Path) -> None:
    names = sorted(path.name for path in (folder / "data/images").glob("*.png"))
    reply = {"from": "gpt", "value": "A red circle, then a blue square."}
    several = [
        {"image": names[n : n + 1 + n % 2], "conversations": [
            {"from": "human", "value": "<image>" * (1 + n % 2) + "\nWhat is this?"}, reply
        ]}
        for n in range(12)
    ]  # fmt: skip
    talk = [
        {
            "conversations": [
                {"from": "human", "value": f"What is number {n}?"},
                {"from": "gpt", "value": "A circle. " * n},
            ]
        }
        for n in range(1, 9)
    ]
    for name, records in (("several", several), ("talk", talk)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def _write_resnet(folder: Path) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(1)
    model = timm.create_model("test_resnet", pretrained=False)
    model.train()(torch.randn(4, 3, 64, 64))  # statistics away from 0 and 1
    folder.mkdir()
    keys = ("input_size", "mean", "std", "first_conv", "classifier")
    settings = {key: model.pretrained_cfg[key] for key in keys} | {"num_classes": 1000}
    record = {"architecture": "test_resnet", "num_classes": 1000, "pretrained_cfg": settings}
    (folder / "config.json").write_text(json.dumps(record))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")


def _write_export(root: Path) -> None:
    """Of a projector that is not at its start."""
    from tiny_export import save_run

    from vlm.export.run import export_run
    from vlm.models.trainable import trained_weights

    parts = make_parts(root, "projector")
    weights = {name: tensor + 0.1 for name, tensor in trained_weights(parts.built.model).items()}
    save_run(root / "first", parts.config.model, weights)
    export_run(root / "first", root / "export")
