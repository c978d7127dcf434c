import json
import os
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from warm import run_warm

from vlm.errors import CheckpointError
from vlm.faults import fault, set_step
from vlm.train.checkpoint import (
    clean_temporary,
    list_checkpoints,
    newest_verified,
    save_checkpoint,
    verify,
)
from vlm.train.fragments import save_tensors


def save(run, step, value=1.0, keep_last=2):
    def write(folder):
        save_file({"w": torch.full((4,), value)}, folder / "weights.safetensors")
        (folder / "engine").mkdir()
        (folder / "engine" / "state.json").write_text("{}")

    return save_checkpoint(run, step, write, {"identity": {}}, keep_last)


def names(run):
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_the_newest_verified_checkpoint_is_found_and_two_are_kept(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step, value=step)
    assert names(tmp_path) == ["latest", "step-000010", "step-000015"]
    newest = newest_verified(tmp_path)
    assert newest.name == "step-000015"
    assert load_file(newest / "weights.safetensors")["w"].tolist() == [15] * 4


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert newest_verified(tmp_path) is None


@pytest.mark.parametrize("offset", [0, 9, 70, 79])
def test_one_flipped_bit_falls_back_to_the_checkpoint_before(tmp_path, offset):
    save(tmp_path, 5), save(tmp_path, 10)
    path = tmp_path / "checkpoints/step-000010/weights.safetensors"
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    assert newest_verified(tmp_path).name == "step-000005"
    assert names(tmp_path) == ["latest", "step-000005", "step-000010.corrupt"]


@pytest.mark.parametrize("key", ["sha256", "size", "identity", "files", "step"])
def test_a_flipped_bit_in_the_manifest_falls_back_too(tmp_path, key):
    save(tmp_path, 5), save(tmp_path, 10)
    manifest = tmp_path / "checkpoints/step-000010/manifest.json"
    text = bytearray(manifest.read_bytes())
    text[text.index(f'"{key}"'.encode()) + 2] ^= 1
    manifest.write_bytes(text)
    assert newest_verified(tmp_path).name == "step-000005"


@pytest.mark.parametrize(
    "damage", ["truncate", "empty", "delete", "no manifest", "garbage manifest", "nested manifest"]
)
def test_a_damaged_file_falls_back_to_the_checkpoint_before(tmp_path, damage):
    save(tmp_path, 5), save(tmp_path, 10)
    weights = tmp_path / "checkpoints/step-000010/weights.safetensors"
    manifest = weights.with_name("manifest.json")
    {
        "truncate": lambda: os.truncate(weights, 20),
        "empty": lambda: weights.write_bytes(b""),
        "delete": weights.unlink,
        "no manifest": manifest.unlink,
        "garbage manifest": lambda: manifest.write_text("{"),
        "nested manifest": lambda: manifest.write_text("[" * 100_000),
    }[damage]()
    assert newest_verified(tmp_path).name == "step-000005"


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    save(tmp_path, 5)
    (tmp_path / "checkpoints/step-000005/weights.safetensors").write_bytes(b"")
    for _ in range(2):  # the same again when the command is run again
        with pytest.raises(CheckpointError, match="none intact"):
            newest_verified(tmp_path)
    (tmp_path / "checkpoints/step-000005").rename(tmp_path / "checkpoints/step-000005.corrupt")
    with pytest.raises(CheckpointError, match="all were set aside"):
        newest_verified(tmp_path)


@pytest.mark.parametrize("latest", [None, "", "step-000099"])
def test_the_directory_scan_decides_whatever_latest_says(tmp_path, latest):
    save(tmp_path, 5), save(tmp_path, 10)
    path = tmp_path / "checkpoints" / "latest"
    path.unlink() if latest is None else path.write_text(latest)
    assert newest_verified(tmp_path).name == "step-000010"


def test_a_checkpoint_of_a_newer_format_is_refused_by_version(tmp_path):
    save(tmp_path, 5)
    path = tmp_path / "checkpoints/step-000005/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="install a newer vlm"):
        newest_verified(tmp_path)
    assert verify(path.parent)
    assert names(tmp_path) == ["latest", "step-000005"]


def test_list_names_each_checkpoint_with_its_problems(tmp_path):
    save(tmp_path, 5), save(tmp_path, 10)
    (tmp_path / "checkpoints/step-000005/engine/state.json").write_text("[]")
    first, second = list_checkpoints(tmp_path)
    assert (first.step, first.problems) == (5, ["engine/state.json was changed: its sha256 differs"])
    assert (second.step, second.problems) == (10, [])


def save_three(run):
    def write(folder):
        save_file({"w": torch.full((4,), 2.0)}, folder / "weights.safetensors")
        fault("save:shard")
        save_file({"o": torch.zeros(4)}, folder / "optimizer.safetensors")

    for step in (10, 15, 20):
        set_step(step)
        save_checkpoint(run, step, write, {}, keep_last=2)


@pytest.mark.parametrize(
    ("point", "newest"),
    [
        ("save:shard@20", "step-000015"),
        ("save:manifest@20", "step-000015"),
        ("save:rename@20", "step-000015"),
        ("save:latest@20", "step-000020"),
        ("save:prune@20", "step-000020"),
    ],
)
def test_a_kill_at_any_point_of_a_save_leaves_a_loadable_checkpoint(tmp_path, point, newest):
    code, _ = run_warm(save_three, tmp_path, VLM_FAULT=f"{point}=kill")
    assert code == -9
    assert newest_verified(tmp_path).name == newest
    clean_temporary(tmp_path)
    assert not [name for name in names(tmp_path) if name.startswith(".tmp")]
    save(tmp_path, 25)
    assert newest_verified(tmp_path).name == "step-000025"


def test_a_full_disk_leaves_the_old_checkpoint_and_no_partial_folder(tmp_path):
    save(tmp_path, 5)

    def write(folder):
        save_tensors({"w": torch.zeros(100_000)}, folder / "weights.safetensors")

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(tmp_path, 10, write, {}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert names(tmp_path) == ["latest", "step-000005"]
    assert newest_verified(tmp_path).name == "step-000005"


def test_saving_the_same_step_again_keeps_the_intact_one_and_replaces_a_damaged_one(tmp_path):
    save(tmp_path, 5, value=1.0)
    save(tmp_path, 5, value=2.0)
    weights = tmp_path / "checkpoints/step-000005/weights.safetensors"
    assert load_file(weights)["w"][0] == 1.0
    weights.write_bytes(b"")
    save(tmp_path, 5, value=2.0)
    assert load_file(weights)["w"][0] == 2.0
