import json
from pathlib import Path

import pytest
from demo.tiny import write_data, write_encoder, write_llm


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Folder with a tiny language model, encoder and data."""
    from vlm.compat import prepare

    prepare()
    folder = tmp_path_factory.mktemp("tiny")
    write_llm(folder / "llm", write_data(folder / "data"))
    write_encoder(folder / "encoder")
    return folder


@pytest.fixture(scope="session")
def config_writer(tiny):
    """Makes writers of configs for a folder."""

    def writer(folder):
        return lambda name="config.yaml", **changes: write_config(folder / name, settings_of(tiny, folder), changes)

    return writer


@pytest.fixture
def config_file(config_writer, tmp_path):
    """Writes a config with changes by dotted key; returns its path. JSON is YAML."""
    return config_writer(tmp_path)


def settings_of(tiny, folder):
    """Values of a config that trains projector and adapters of the tiny model for 12 steps."""
    return {
        "output_dir": str(folder / "run"),
        "seed": 5,
        "model": {
            "vision": {"backend": "hf", "path": str(tiny / "encoder"), "layer": -2},
            "projector": {"kind": "linear", "normalize": True},
            "llm": {"path": str(tiny / "llm")},
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
            "trainable": ["projector", "llm.lora"],
        },
        "data": {
            "template": "chatml",
            "sources": [{"path": str(tiny / "data/finetune.jsonl"), "images": str(tiny / "data/images")}],
            "cache": str(folder / "cache"),
            "max_length": 96,
            "held_out": 0.1,
        },
        "train": {
            "max_steps": 12,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 3e-3,
            "precision": "fp32",
            "save_every": 5,
        },
    }


def write_config(path, settings, changes):
    for key, value in changes.items():
        *parts, last = key.split("__")
        target = settings
        for part in parts:
            target = target[part]
        target[last] = value
    path.write_text(json.dumps(settings))
    return path
