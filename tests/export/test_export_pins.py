"""A checkpoint knows its base models and its start by content, and is not completed by others."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_export import model_config, save_run, write_clip, write_llm, write_run

from vlm.artifacts import pins
from vlm.artifacts.pins import Pins, pin_start, places_of, refuse_replaced
from vlm.errors import CheckpointError
from vlm.export.run import export_run
from vlm.models.config import ModelConfig
from vlm.models.trainable import trained_weights


def change_one_weight(file: Path) -> None:
    """The last value of one tensor: what a sample of the file would miss."""
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[-1] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})


def pinned_run(tmp_path: Path, config: ModelConfig, init_from: Path | None = None) -> Path:
    """A run whose checkpoint has the sums of what it began with, as training writes them."""
    run = tmp_path / "run"
    built = write_run(tmp_path / "weights", config, init_from=init_from)
    start = pin_start(config, None if init_from is None else str(init_from))
    save_run(run, config, trained_weights(built.model), init_from=init_from, info={"start": start})
    return run


def refused(run: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        export_run(run)
    return str(error.value)


@pytest.mark.slow
def test_an_export_is_made_while_all_is_as_it_was(tmp_path: Path):
    export_run(pinned_run(tmp_path, model_config(tmp_path)))


@pytest.mark.parametrize("part", ["llm", "clip"])
def test_one_changed_weight_of_a_base_model_is_enough(part: str, tmp_path: Path):
    run = pinned_run(tmp_path, model_config(tmp_path))
    change_one_weight(tmp_path / part / "model.safetensors")
    message = refused(run)
    key = {"llm": "model.llm.path", "clip": "model.vision.path"}[part]
    assert f"{run / 'checkpoints' / 'step-000007'}: what this run began with has been replaced" in message
    assert f"  {key} {tmp_path / part}: model.safetensors: " in message
    assert "Put the old files back; or begin a run with the new ones" in message


@pytest.mark.slow
def test_a_changed_setting_is_a_changed_model_and_a_new_version_stamp_is_none(tmp_path: Path):
    run = pinned_run(tmp_path, model_config(tmp_path))
    file = tmp_path / "llm" / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"transformers_version": "9.9"}))
    export_run(run)
    file.write_text(json.dumps(values | {"rms_norm_eps": 1e-3}))
    assert "config.json" in refused(run)


@pytest.mark.slow
def test_the_export_that_a_run_began_with_is_pinned_in_the_parts_that_the_run_leaves_alone(tmp_path: Path):
    first = model_config(tmp_path, lora=None, trainable=["projector"])
    write_run(tmp_path / "one", first)
    write_run(tmp_path / "two", first, seed=3)
    start = export_run(tmp_path / "one", tmp_path / "start")
    run = pinned_run(tmp_path, model_config(tmp_path, trainable=["llm.lora"]), init_from=start)
    export_run(tmp_path / "one", start)  # the same weights again
    export_run(run)
    export_run(tmp_path / "two", start)
    assert f"  init_from {start}: projector.safetensors: " in refused(run)


@pytest.mark.slow
def test_what_the_run_trains_itself_may_change(tmp_path: Path):
    config = model_config(tmp_path, lora=None, trainable=["projector", "llm"])
    before = pin_start(config, None)
    assert sorted(before["model.llm.path"]) == ["config.json"]
    assert sorted(before["model.vision.path"]) == ["config.json", "model.safetensors"]
    write_run(tmp_path / "one", config)
    start = export_run(tmp_path / "one")
    assert sorted(pin_start(config, str(start))["init_from"]) == ["vlm.json"]
    lora = model_config(tmp_path, trainable=["llm.lora"])
    assert sorted(pin_start(lora, str(start))["init_from"]) == [
        "llm/model.safetensors", "projector.safetensors", "vlm.json",
    ]  # fmt: skip
    assert sorted(pin_start(lora, str(start))["model.llm.path"]) == ["config.json"]  # its weights come from the start


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_is_taken_with_one_line(tmp_path: Path, capsys: Any):
    write_run(tmp_path / "run", model_config(tmp_path))
    export_run(tmp_path / "run")
    assert capsys.readouterr().err.count("is of an earlier version: whether the models that it began with") == 1


def test_a_model_that_is_gone_is_left_to_whoever_loads_it(tmp_path: Path):
    run = pinned_run(tmp_path, model_config(tmp_path))
    shutil.rmtree(tmp_path / "llm")
    assert "model.llm.path" in refused(run)
    assert "has been replaced" not in refused(run)


def test_the_sum_of_a_large_file_is_kept_until_the_file_changes(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(pins, "_LARGE", 100)
    monkeypatch.setenv("VLM_CACHE_DIR", str(tmp_path / "machine"))
    write_llm(tmp_path / "llm")
    config = ModelConfig.model_validate({"llm": {"path": str(tmp_path / "llm")}, "trainable": ["llm.lora"], "lora": {}})
    summed: list[str] = []
    whole = pins.sha256
    monkeypatch.setattr(pins, "sha256", lambda file: (summed.append(file.name), whole(file))[1])
    before = [pin_start(config, None) for _ in range(2)]
    assert before[0] == before[1]
    assert summed == ["model.safetensors"]
    file = tmp_path / "llm" / "model.safetensors"
    times = file.stat()
    change_one_weight(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as `cp -p` leaves it: the same size and date
    assert pin_start(config, None) != before[0]


def test_files_that_came_or_went_are_named(tmp_path: Path):
    write_clip(tmp_path / "clip")
    before: Pins = {"model.vision.path": {"a.safetensors": "1" * 64, "b.safetensors": "2" * 64}}
    now: Pins = {"model.vision.path": {"a.safetensors": "1" * 64, "c.safetensors": "3" * 64}}
    with pytest.raises(CheckpointError) as error:
        refuse_replaced(Path("step-1"), before, now, places_of(model_config(tmp_path), None))
    assert "b.safetensors: 2222222222222222 -> absent" in str(error.value)
    assert "c.safetensors: absent -> 3333333333333333" in str(error.value)
    refuse_replaced(Path("step-1"), before, {}, {})


def test_a_resumed_run_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: Any):
    from vlm import run as run_module

    config = model_config(tmp_path)
    run = pinned_run(tmp_path, config)
    change_one_weight(tmp_path / "llm" / "model.safetensors")
    whole = type("Config", (), {"model": config, "init_from": None})()
    with pytest.raises(CheckpointError, match="has been replaced since"):
        run_module._pin_start(whole, run / "checkpoints" / "step-000007")
    assert run_module._pin_start(whole, None) == pin_start(config, None)
