"""`train.precision: auto` in whole runs: what is chosen is told, kept in the checkpoint, and kept at a resume."""

import json

import pytest
import torch

from vlm import precision
from vlm.config import load_config
from vlm.errors import CheckpointError
from vlm.precision import CpuSpeed
from vlm.run import defaults_of, keys_of_other_kinds, run_identity, train
from vlm.settle import settle_precision
from vlm.train.checkpoint import MANIFEST, newest_verified, read_info
from vlm.train.resume import refuse_other_run

OLDER, NEWER = CpuSpeed(0.0125, 0.1), CpuSpeed(4.3, 0.8)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    monkeypatch.setenv("VLM_CACHE_DIR", str(tmp_path / "machine"))

    def pretend(speed):
        monkeypatch.setattr(precision, "_remembered", {})
        monkeypatch.setattr(precision, "cpu_speed", lambda: speed)

    return pretend


def run(path):
    return train(load_config(path), path.read_text())


def began_with(folder):
    return read_info(newest_verified(folder))["identity"]["train.precision"]


@pytest.mark.slow
def test_a_run_goes_on_in_the_precision_it_began_with_on_a_machine_of_the_other_kind(config_file, machine, capsys):
    machine(NEWER)
    folder = run(config_file(train__precision="auto", train__max_steps=2))
    assert "precision: bf16, as on this CPU" in capsys.readouterr().err
    assert began_with(folder) == "bf16"
    machine(OLDER)
    assert run(config_file(train__precision="auto", train__max_steps=4)) == folder
    said = capsys.readouterr().err
    assert "precision: bf16, as the run began" in said
    assert "80 times slower than fp32" in said
    assert began_with(folder) == "bf16"


@pytest.mark.slow
def test_auto_on_an_older_cpu_trains_as_fp32_does(config_file, machine, tmp_path, capsys):
    machine(OLDER)
    folder = run(config_file(train__precision="auto", train__max_steps=2))
    expected = run(config_file("fp32.yaml", train__max_steps=2, output_dir=str(tmp_path / "fp32")))
    assert (folder / "metrics.jsonl").read_text().count("\n") == 2
    for got, wanted in zip(*(_losses(each) for each in (folder, expected)), strict=True):
        assert got == wanted
    assert "matrix product 80x slower" in capsys.readouterr().err


@pytest.mark.slow
def test_another_precision_in_the_config_does_not_resume(config_file, machine):
    machine(OLDER)
    run(config_file(train__precision="auto", train__max_steps=2))
    with pytest.raises(CheckpointError, match=r"train\.precision: 'fp32' -> 'bf16'"):
        run(config_file(train__precision="bf16", train__max_steps=4))


@pytest.mark.parametrize(("key", "is_same"), [("model.projector.unshuffle", True), ("model.projector.kind", False)])
def test_a_checkpoint_from_before_a_key_existed_means_its_default(config_file, key, is_same, tmp_path):
    config = load_config(config_file(model__projector={"kind": "mlp"}))
    identity = run_identity(config)
    old = {name: value for name, value in identity.items() if name != key}
    (tmp_path / MANIFEST).write_text(json.dumps({"identity": old}))
    if is_same:
        refuse_other_run(tmp_path, identity, defaults_of(config))
    else:  # the default is linear
        with pytest.raises(CheckpointError, match=r"model\.projector\.kind: 'linear' -> 'mlp'"):
            refuse_other_run(tmp_path, identity, defaults_of(config))


@pytest.mark.parametrize(("kind", "is_same"), [("linear", True), ("mlp", False)])
def test_a_key_of_another_kind_in_an_older_checkpoint_is_not_compared(config_file, kind, is_same, tmp_path):
    config = load_config(config_file(model__projector={"kind": kind}))
    identity = run_identity(config)
    assert ("model.projector.depth" in identity) is not is_same
    (tmp_path / MANIFEST).write_text(json.dumps({"identity": identity | {"model.projector.depth": 3}}))
    arguments = tmp_path, identity, defaults_of(config), keys_of_other_kinds(config)
    if is_same:
        refuse_other_run(*arguments)
    else:
        with pytest.raises(CheckpointError, match=r"model\.projector\.depth: 3 -> 2"):
            refuse_other_run(*arguments)


@pytest.mark.parametrize(("began", "dtype"), [("fp32", "fp32"), ("bf16", "bf16")])
def test_a_run_from_before_encoders_chose_goes_on_as_its_precision_says(config_file, machine, began, dtype):
    machine(NEWER)
    config = load_config(config_file(train__precision="auto"))
    old = settle_precision(config, torch.device("cpu"), {"train.precision": began})
    assert (old.train.precision, old.model.vision.compute, old.data.cache_dtype) == (began, dtype, dtype)
    newer = {"train.precision": began, "model.projector.pool": 1, "model.vision.compute": "fp32_channels_last"}
    assert settle_precision(config, torch.device("cpu"), newer).model.vision.compute == "fp32_channels_last"
    fresh = settle_precision(config, torch.device("cpu"))
    assert (fresh.model.vision.compute, fresh.data.cache_dtype) == ("auto", "bf16")


def _losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
