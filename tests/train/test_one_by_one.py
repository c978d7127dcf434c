"""Decoders whose packed records are decoded one by one train alike in every engine."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from prove_engines import Case, run_cases, worst_differences
from tokenizers_for_tests import byte_level_bpe
from toy_decoders import toy_decoder
from toy_runs import start_warm

from vlm.errors import ConfigError
from vlm.models.vlm import VisionLanguageModel
from vlm.prepare import _describe_packing
from vlm.train.engines.kind import EngineKind, Place
from vlm.train.engines.kinds import Ddp, Fsdp, Zero

ENGINES = ("ddp*2", "zero2*2")
STEPS = 2


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Mamba, with records of very unequal length: the ranks need one, two or three forwards for their rows."""
    words = ["red", "green", "blue", "square", "circle", "cat", "dog", "bird"]
    records = [
        {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": " ".join(words * times)}]}
        for times in (1, 5, 1, 1, 2, 1, 4, 1, 1, 3, 1, 1) * 2
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    tokenizer = byte_level_bpe()
    tokenizer.save_pretrained(tmp_path / "llm")
    toy_decoder("mamba", vocab_size=len(tokenizer), pad_token_id=None, eos_token_id=0).save_pretrained(tmp_path / "llm")
    settings = {
        "output_dir": str(tmp_path / "run"),
        "model": {"llm": {"path": str(tmp_path / "llm")}, "trainable": ["llm"]},
        "data": {
            "template": "chatml", "sources": [{"path": str(tmp_path / "data.json")}], "max_length": 512,
            "held_out": 0.0, "cache": str(tmp_path / "cache"),
        },
        "train": {
            "max_steps": STEPS, "global_batch_size": 2, "micro_batch_size": 1, "precision": "fp32",
            "learning_rate": 1e-3,
        },
        "engine": {"timeout_seconds": 60},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "config.yaml"


@pytest.mark.thorough
@pytest.mark.slow
def test_ranks_that_need_unequal_numbers_of_forwards_train_alike(config: Path, tmp_path: Path):
    torch.manual_seed(0)
    cases = [Case(engine) for engine in ("local", *ENGINES)]
    outcomes = run_cases(str(config), cases, STEPS, tmp_path, start_warm)
    reference = outcomes[cases[0]]
    for case in cases[1:]:
        loss, norm, weights = worst_differences(reference, outcomes[case])
        print(case.engine, loss, norm, weights)
        assert loss < 1e-5
        assert norm < 1e-4
        assert weights < 1e-5


@pytest.mark.parametrize("gathering", [Zero(stage=3), Fsdp()], ids=["zero", "fsdp"])
def test_engines_whose_ranks_gather_parts_refuse_such_a_decoder_by_name(gathering: EngineKind):
    llm = toy_decoder("mamba", vocab_size=64)
    model = VisionLanguageModel(llm)
    config = SimpleNamespace(data=SimpleNamespace(packing=True, max_length=64))
    _describe_packing(config, model, Ddp(), Place(0, 2))  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=f"engine.kind {gathering.kind}: model type mamba is decoded record by record"
    ):
        _describe_packing(config, model, gathering, Place(0, 2))  # type: ignore[arg-type]
