"""`vlm ckpt`, `vlm doctor`, and what export, eval and chat say before anything heavy is loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from vlm.train.checkpoint import save_checkpoint


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 1 and 2."""
    for step in (1, 2):
        save_checkpoint(tmp_path, step, lambda folder: (folder / "a.bin").write_bytes(b"1234"), {}, keep_last=2)
    return tmp_path


def test_ckpt_ls_verifies_each_checkpoint(run_folder, vlm):
    (run_folder / "checkpoints/step-000002/a.bin").write_bytes(b"12")
    code, out, _ = vlm("ckpt", "ls", str(run_folder))
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["step-000001", "step-000002"]
    assert out.splitlines()[0].endswith("intact")
    assert out.splitlines()[1].endswith("a.bin has 2 bytes, 4 written")


def test_ckpt_verify_ends_with_5_when_a_file_differs(run_folder, vlm):
    assert vlm("ckpt", "verify", str(run_folder)) == (0, f"{run_folder}: 2 checkpoints intact\n", "")
    damaged = run_folder / "checkpoints/step-000002"
    (damaged / "a.bin").write_bytes(b"1235")
    assert vlm("ckpt", "verify", str(run_folder / "checkpoints/step-000001"))[0] == 0
    code, _, err = vlm("ckpt", "verify", str(damaged))
    assert (code, "a.bin was changed: its sha256 differs" in err) == (5, True)
    assert vlm("ckpt", "verify", str(run_folder))[0] == 5


@pytest.mark.parametrize("command", [["ckpt", "ls"], ["ckpt", "verify"], ["export"], ["chat"]])
def test_a_folder_that_is_not_there_ends_with_5_and_loads_nothing_heavy(command, tmp_path, monkeypatch, vlm):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, _, err = vlm(*command, str(tmp_path / "nowhere"))
    assert (code, "nowhere" in err) == (5, True)


def test_eval_of_an_export_without_its_run_asks_for_the_config(tmp_path, vlm):
    (tmp_path / "vlm.json").write_text("{}")
    code, _, err = vlm("eval", str(tmp_path))
    assert (code, f"vlm eval CONFIG --export {tmp_path}" in err) == (2, True)


def test_eval_of_a_run_or_its_export_takes_the_runs_config(tmp_path, monkeypatch, vlm):
    (tmp_path / "config.yaml").write_text("sed: 1\n")
    (tmp_path / "export").mkdir()
    (tmp_path / "export/vlm.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "export"):
        assert f"{tmp_path}/config.yaml:1: sed: unknown key; did you mean seed?" in vlm("eval", str(folder))[2]


def test_doctor_names_versions_and_what_installs_the_optional_ones(monkeypatch, vlm):
    from vlm.cli import doctor

    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "gradio" else "1.2.3")
    code, out, _ = vlm("doctor")
    assert code == 0
    assert "  torch            1.2.3" in out
    assert "  gradio           not installed; optional: pip install -e .[serve]" in out


def test_doctor_as_json_says_what_is_missing_too(monkeypatch, vlm):
    from vlm.cli import doctor

    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "timm" else "1.2.3")
    code, out, _ = vlm("doctor", "--json")
    found = json.loads(out)
    assert (code, found["packages"]["timm"], found["packages"]["torch"], found["devices"]) == (2, None, "1.2.3", None)
    assert found["optional"]["gradio"] == {"version": "1.2.3", "extra": "serve"}
    monkeypatch.setattr(doctor, "_version", lambda name: "1.2.3")
    code, out, _ = vlm("doctor", "--json")
    assert (code, len(json.loads(out)["devices"]["gpus"])) == (0, torch.cuda.device_count())


def test_doctor_ends_with_2_when_a_needed_package_is_missing(monkeypatch, vlm):
    from vlm.cli import doctor

    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "timm" else "1.2.3")
    code, out, err = vlm("doctor")
    assert (code, "timm             MISSING" in out) == (2, True)
    assert "missing: timm. Install with: pip install -e ." in err
