"""One `.pth` for tools that want one."""

from __future__ import annotations

import resource
import signal
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from tiny_export import model_config, write_run

from vlm.cli.main import main
from vlm.errors import CheckpointError, ConfigError
from vlm.export.pth import export_pth
from vlm.models.trainable import merge_lora, part_weights, trained_weights


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run", model_config(tmp_path))
    return tmp_path / "run"


def test_the_file_is_a_plain_dict_of_what_trained(tmp_path: Path):
    built = write_run(tmp_path / "run", model_config(tmp_path))
    file = export_pth(tmp_path / "run")
    assert file == tmp_path / "run/export.pth"
    found = torch.load(file, weights_only=True)
    expected = trained_weights(built.model)
    assert type(found) is dict
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "projector.layers.0.weight" in found


@pytest.mark.parametrize("damage", ["one tensor differs", "one tensor is missing", "it is cut off"])
def test_a_file_that_does_not_read_back_is_no_export(run: Path, monkeypatch: pytest.MonkeyPatch, damage: str):
    def write(tensors: dict[str, torch.Tensor], file: BinaryIO) -> None:
        name = "projector.layers.0.weight"
        changed = {name: 2 * tensors[name]} if damage == "one tensor differs" else {}
        kept = {each: tensors[each] for each in tensors if each != name} if "missing" in damage else tensors
        torch.save(kept | changed, file)
        if damage == "it is cut off":
            file.truncate(1000)

    monkeypatch.setattr("vlm.export.pth._save", write)
    with pytest.raises(CheckpointError, match=r"export\.pth was not written: what was read back"):
        export_pth(run)
    assert [file.name for file in run.iterdir() if "pth" in file.name] == []


def test_the_full_file_holds_every_part_with_the_adapter_merged(tmp_path: Path):
    built = write_run(tmp_path / "run", model_config(tmp_path))
    found = torch.load(export_pth(tmp_path / "run", full=True, dtype="fp32"), weights_only=True)
    merge_lora(built.model)
    for part in ("projector", "vision", "llm"):
        for name, tensor in part_weights(built.model, part).items():
            assert (found[name] - tensor).abs().max() < 1e-6, name  # worst seen 0
    assert not any("lora" in name for name in found)


def test_vlm_export_format_pth_writes_where_it_is_told(run: Path, tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "for-others/weights.pth"
    monkeypatch.setattr("sys.argv", ["vlm", "export", str(run), str(out), "--format", "pth"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert torch.load(out, weights_only=True)
    assert not (run / "export").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["weights.bin", "--format", "pth"], "name ends in .pth"),
        (["--format", "pth", "--max-shard-size", "1GB"], "--max-shard-size does not go with --format pth"),
        (["--format", "onnx"], "onnx"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, said, run: Path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["vlm", "export", str(run), *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_an_interrupted_export_leaves_the_old_file_and_no_other(run: Path, monkeypatch):
    before = export_pth(run).read_bytes()
    monkeypatch.setenv("VLM_FAULT", "export:rename=raise")
    with pytest.raises(RuntimeError, match="injected"):
        export_pth(run)
    assert (run / "export.pth").read_bytes() == before
    assert not list(run.glob(".tmp-*"))


def test_a_folder_that_cannot_be_written_is_one_line(run: Path):
    (run / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*weights\.pth"):
        export_pth(run, run / "file/weights.pth")


def test_a_full_disk_leaves_the_old_file_and_no_other(run: Path):
    before = export_pth(run).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the limit kills the process
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        with pytest.raises(ConfigError, match="Usually the disk is full"):
            export_pth(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (run / "export.pth").read_bytes() == before
    assert not list(run.glob(".tmp-*"))
