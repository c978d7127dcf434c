"""Pickles that run code when they are loaded, planted wherever weights are read: none of them ever runs.

Each refusal or neglect is beside a test that the true file still loads.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_export import model_config, save_run, write_clip, write_llm, write_run

from vlm.artifacts.peft_adapter import read_peft
from vlm.compat import prepare
from vlm.config import load_config
from vlm.errors import CheckpointError, ConfigError
from vlm.export.pth import export_pth
from vlm.export.run import export_run
from vlm.files import sha256
from vlm.inference.load import load
from vlm.models.build import build_model
from vlm.models.config import LLMConfig, VisionConfig
from vlm.models.llm import load_llm
from vlm.models.pipeline_build import build_stage
from vlm.models.trainable import trained_weights
from vlm.models.vision import build_vision
from vlm.run import train
from vlm.train.checkpoint import MANIFEST, _digest, newest_verified
from vlm.train.fragments import read_weights

FORMS = ("pickle", "zip", "legacy")  # a bare pickle, torch.save's archive, and torch.save's old stream


class Attack:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """Appears when an attack ran. Checked at the end of every test here."""
    path = tmp_path / "the-attack-ran"
    yield path
    assert not path.exists()


@pytest.fixture
def plant(marker):
    def write(path: Path, form: str = "zip") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        if form == "pickle":
            path.write_bytes(pickle.dumps({"weight": Attack(marker)}))
        else:
            torch.save({"weight": Attack(marker)}, path, _use_new_zipfile_serialization=form == "zip")
        return path

    return write


@pytest.mark.parametrize("form", FORMS)
def test_the_attack_works_on_whoever_unpickles(form, plant, marker, tmp_path):
    file = plant(tmp_path / "weights.pt", form)
    if form == "pickle":
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert marker.is_dir()
    marker.rmdir()
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        torch.load(file, weights_only=True)


def test_the_program_has_no_call_that_could_unpickle():
    """What it reads through timm and open_clip is tested below; they pass weights_only=True. So do the lines that read
    other programs' adapters and projectors."""
    calls = re.compile(r"torch\.load\(|pickle\.loads?\(|joblib|shelve|np\.load\(|weights_only=False")
    lines = [
        f"{path.name}: {line.strip()}"
        for path in (Path(__file__).parents[2] / "vlm").rglob("*.py")
        for line in path.read_text().splitlines()
        if calls.search(line) and "allow_pickle=False" not in line and "weights_only=True" not in line
    ]
    lines = [line for line in lines if "log(f" not in line]  # a log line tells others how to load a .pth
    assert [line for line in lines if "torch.load(" not in line or "weights_only=True" not in line] == []


@pytest.mark.parametrize("form", FORMS)
def test_a_pickled_adapter_of_another_program_is_plain_tensors_or_refused(form, plant, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    plant(tmp_path / "adapter_model.bin", form)
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        read_peft(tmp_path)
    names = ("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight")
    torch.save({name: torch.ones(2, 2) for name in names}, tmp_path / "adapter_model.bin")
    assert list(read_peft(tmp_path).layers) == ["q"]


# A checkpoint folder

DEEPSPEED = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "layer_00-model_states.pt")
OTHERS = (
    ".metadata", "__0_0.distcp", "weights.pt", "weights/rank-00000.pt", "weights/rank-00000.bin",
    "weights/pytorch_model.bin", "optimizer/optimizer.pt", "optimizer/rank-00001.pth", "rng/rng_state.pth",
    "scheduler.pkl", "training_args.bin", "stream.pkl", "progress.pkl", "trainer_state.pkl",
)  # fmt: skip


def run_for(config_file, steps):
    lora = {"rank": 4, "alpha": 8}
    changes = {"train__save_every": 2, "train__schedule": "constant", "train__prove": False, "model__lora": lora}
    path = config_file(train__max_steps=steps, **changes)
    return train(load_config(path), path.read_text())


@pytest.mark.slow
def test_pickles_beside_a_checkpoint_are_ignored_by_resume_and_export(config_file, plant, tmp_path):
    straight = run_for(config_file, 6)
    expected = read_weights(newest_verified(straight))
    straight.rename(tmp_path / "straight")
    run = run_for(config_file, 4)
    for folder in (run, newest_verified(run), newest_verified(run) / "global_step4", run / "checkpoints"):
        for number, name in enumerate(DEEPSPEED + OTHERS):
            plant(folder / name, FORMS[number % 3])
    with zipfile.ZipFile(newest_verified(run) / "weights.zip", "w") as archive:
        archive.writestr("../../../escaped.pt", b"")
    run_for(config_file, 6)
    got = read_weights(newest_verified(run))
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert load(export_run(run), device="cpu", precision="fp32").model is not None
    assert not (tmp_path / "escaped.pt").exists()


@pytest.mark.slow
def test_a_pickle_in_place_of_a_checkpoints_file_is_set_aside_or_refused(config_file, plant):
    run = run_for(config_file, 4)
    plant(newest_verified(run) / "weights/rank-00000.safetensors")
    assert newest_verified(run).name == "step-000002"  # the true one before; its sum differs
    assert run_for(config_file, 4) == run
    planted = [("weights/rank-00000.safetensors", form) for form in FORMS] + [
        ("optimizer/rank-00000.safetensors", "pickle"), ("rng/rank-00000.safetensors", "zip"),
        ("stream.json", "legacy"), ("progress.json", "pickle"),
    ]  # fmt: skip
    for name, form in planted:
        checkpoint = newest_verified(run)  # the attacker rewrites the manifest too
        true = (checkpoint / name).read_bytes()
        plant(checkpoint / name, form)
        seal(checkpoint)
        assert newest_verified(run) == checkpoint
        with pytest.raises(CheckpointError, match=re.escape(name)):
            run_for(config_file, 6)
        if name.startswith("weights"):
            with pytest.raises(CheckpointError, match=re.escape(name)):
                export_run(run)
        (checkpoint / name).write_bytes(true)
        seal(checkpoint)
    plant(newest_verified(run) / "weights/rank-00001.safetensors")  # a file more
    with pytest.raises(CheckpointError, match="rank-00001"):
        run_for(config_file, 6)
    (newest_verified(run) / "weights/rank-00001.safetensors").unlink()
    assert newest_verified(run_for(config_file, 6)).name == "step-000006"


def seal(checkpoint):
    """Write a manifest that agrees with the files as they are."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest.pop("sha256")
    for name in manifest["files"]:
        file = checkpoint / name
        manifest["files"][name] = {"size": file.stat().st_size, "sha256": sha256(file)}
    manifest["sha256"] = _digest(manifest)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


# An export folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run and its export: what trained, projector and adapter."""
    folder = tmp_path_factory.mktemp("exported")
    write_run(folder / "run", model_config(folder))
    export_run(folder / "run")
    return folder / "run"


@pytest.fixture
def export(exported, tmp_path):
    """The export of a copy of that run."""
    return shutil.copytree(exported, tmp_path / "run") / "export"


def test_pickles_beside_an_export_are_ignored(export, plant):
    names = ("pytorch_model.bin", "projector.pt", "projector.pth", "adapter/adapter_model.bin", "training_args.bin",
             "llm/pytorch_model.bin", "vision.pt", "optimizer.pt", "model.pkl", ".metadata")  # fmt: skip
    expected = trained_weights(load(export, device="cpu").model)
    for number, name in enumerate(names):
        plant(export / name, FORMS[number % 3])
    got = trained_weights(load(export, device="cpu").model)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["projector.safetensors", "adapter/adapter_model.safetensors", "vlm.json"])
def test_a_pickle_in_place_of_an_exports_file_is_refused(name, form, export, plant):
    true = (export / name).read_bytes()
    plant(export / name, form)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load(export, device="cpu")
    (export / name).write_bytes(true)
    assert load(export, device="cpu").model is not None


@pytest.mark.slow
def test_pickles_instead_of_an_exports_safetensors_are_not_a_second_choice(export, plant, tmp_path):
    (export / "adapter/adapter_model.safetensors").rename(tmp_path / "kept")
    plant(export / "adapter/adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is missing"):
        load(export, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["clip", "plain"])
def test_pickles_instead_of_a_full_exports_safetensors_are_refused(backend, plant, tmp_path):
    changes = {} if backend == "clip" else {"projector": {"kind": "mlp", "unshuffle": 2}}
    write_run(tmp_path / "run", model_config(tmp_path, **changes))
    full = export_run(tmp_path / "run", full=True)
    folder = full if backend == "clip" else full / "llm"
    assert load(full, device="cpu").model is not None
    (folder / "model.safetensors").rename(tmp_path / "kept")
    for name in ("pytorch_model.bin", "model.pt", "model.pth"):
        plant(folder / name)
    with pytest.raises(CheckpointError):
        load(full, device="cpu")


@pytest.mark.slow
def test_a_pth_that_was_exported_is_never_read_back(export, plant, tmp_path):
    run = tmp_path / "run"
    plant(export_pth(run))
    assert load(export_run(run), device="cpu").model is not None
    with pytest.raises((CheckpointError, ConfigError)):
        load(run / "export.pth", device="cpu")


# A language model


@pytest.mark.parametrize("form", FORMS)
def test_pickled_weights_of_a_language_model_are_refused(form, plant, tmp_path):
    folder = write_llm(tmp_path / "llm")
    true = (folder / "model.safetensors").read_bytes()
    plant(folder / "pytorch_model.bin", form)
    assert load_llm(LLMConfig(path=str(folder)), torch.float32) is not None  # the true file beside it
    plant(folder / "model.safetensors", form)
    check_refused(tmp_path)
    (folder / "model.safetensors").unlink()
    check_refused(tmp_path)
    shutil.copy(folder / "pytorch_model.bin", folder / "model.bin")
    names = list(load_names(true, tmp_path))
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        weight_map = dict.fromkeys(names, "pytorch_model.bin")
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        check_refused(tmp_path)
        (folder / index).unlink()
    (folder / "model.safetensors").write_bytes(true)
    assert load_llm(LLMConfig(path=str(folder)), torch.float32) is not None


def load_names(true, tmp_path):
    (tmp_path / "true.safetensors").write_bytes(true)
    return load_file(tmp_path / "true.safetensors")


def check_refused(tmp_path):
    config = model_config(tmp_path)
    with pytest.raises(CheckpointError):
        build_model(config)
    with pytest.raises(CheckpointError):
        build_stage(config, (1,), 1)


# Vision encoders


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.safetensors"])
def test_pickled_weights_of_a_transformers_encoder_are_refused(name, form, plant, tmp_path):
    folder = write_clip(tmp_path / "clip")
    config = VisionConfig(backend="hf", path=str(folder), layer=-2)
    true = (folder / "model.safetensors").read_bytes()
    if name != "model.safetensors":
        plant(folder / name, form)
        assert build_vision(config).width == 32  # the true file beside it
        (folder / "model.safetensors").unlink()
    plant(folder / name, form)
    with pytest.raises(CheckpointError):
        build_vision(config)
    (folder / "model.safetensors").write_bytes(true)
    assert build_vision(config).width == 32


@pytest.fixture
def timm_folder(tmp_path):
    prepare()
    import timm

    folder = tmp_path / "timm"
    folder.mkdir()
    model = timm.create_model("test_vit")
    settings = {key: model.pretrained_cfg[key] for key in ("input_size", "mean", "std", "first_conv", "classifier")}
    record = {"architecture": "test_vit", "num_classes": 1000, "pretrained_cfg": settings | {"num_classes": 1000}}
    (folder / "config.json").write_text(json.dumps(record))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_pickled_weights_of_a_timm_encoder_are_refused(form, plant, timm_folder, tmp_path):
    config = VisionConfig(backend="timm", path=str(timm_folder), layer=-2)
    for name in ("pytorch_model.bin", "model.pth", "checkpoint.pth.tar"):
        plant(timm_folder / name, form)
    assert build_vision(config).width == 64  # the true file beside them
    true = timm_folder / "model.safetensors"
    true.rename(timm_folder / "other.safetensors")  # timm then takes pytorch_model.bin, which it reads weights_only
    with pytest.raises(CheckpointError):
        build_vision(config)
    (timm_folder / "other.safetensors").rename(tmp_path / "true.safetensors")
    with pytest.raises(CheckpointError, match=r"no \.safetensors in it, and other weights are not read"):
        build_vision(config)
    plant(true, form)
    with pytest.raises(CheckpointError):
        build_vision(config)
    named = VisionConfig(backend="timm", path="test_vit", pretrained=str(timm_folder / "model.pth"))
    with pytest.raises(ConfigError, match=r"read from \.safetensors files only"):
        build_vision(named)
    with pytest.raises(CheckpointError):
        build_vision(named.model_copy(update={"pretrained": str(true)}))
    assert build_vision(named.model_copy(update={"pretrained": str(tmp_path / "true.safetensors")})).width == 64


TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 7},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}


@pytest.mark.parametrize("form", FORMS)
def test_pickled_weights_of_an_open_clip_encoder_are_refused_and_true_ones_still_load(form, plant, tmp_path):
    """open_clip's own weights are .pt files of tensors: those are read, weights_only."""
    prepare()
    import open_clip

    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/tiny-for-pickles.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "configs")
    weights = open_clip.create_model("tiny-for-pickles", load_weights=False).state_dict()

    def named(file):
        return VisionConfig(backend="open_clip", path="tiny-for-pickles", pretrained=str(file))

    for name in ("evil.pt", "evil.pth", "evil.bin", "evil.safetensors"):
        with pytest.raises(CheckpointError):
            build_vision(named(plant(tmp_path / name, form)))
    torch.save(weights, tmp_path / "true.pt", _use_new_zipfile_serialization=form != "legacy")
    assert build_vision(named(tmp_path / "true.pt")).width == 32
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_CLIP, "preprocess_cfg": {}}))
    local = VisionConfig(backend="open_clip", path=str(folder))
    for name in ("open_clip_pytorch_model.bin", "open_clip_model.pt", "open_clip_model.safetensors"):
        plant(folder / name, form)
        with pytest.raises(CheckpointError):
            build_vision(local)
        (folder / name).unlink()
    torch.save(weights, folder / "open_clip_pytorch_model.bin")
    assert build_vision(local).width == 32


def test_a_run_with_a_planted_base_model_ends_before_a_run_folder_has_weights(plant, tmp_path, config_file, tiny):
    """The whole way, as a user goes it: `vlm train` with an encoder from a stranger."""
    folder = shutil.copytree(tiny / "encoder", tmp_path / "stranger")
    (folder / "model.safetensors").unlink()
    plant(folder / "pytorch_model.bin")
    path = config_file(model__vision={"backend": "hf", "path": str(folder), "layer": -2})
    with pytest.raises(CheckpointError, match=r"Pickled weights \(\.bin, \.pth\) are not loaded, as they can run code"):
        train(load_config(path), path.read_text())
    assert newest_verified(tmp_path / "run") is None


def test_a_checkpoint_of_format_version_1_has_one_file_and_a_pickle_there_is_refused(plant, tmp_path):
    config = model_config(tmp_path)
    built = build_model(config)
    save_run(tmp_path / "old", config, trained_weights(built.model))
    checkpoint = newest_verified(tmp_path / "old")
    assert read_weights(checkpoint).keys() == trained_weights(built.model).keys()
    plant(checkpoint / "weights.safetensors")
    seal(checkpoint)
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        read_weights(checkpoint)
