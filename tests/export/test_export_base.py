"""Exports whose base models are named relative to the folder of training, used from elsewhere."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_export import model_config, write_image, write_run

import vlm
from vlm.artifacts.adapter import read_adapter
from vlm.artifacts.base_models import with_bases_found, with_start_found
from vlm.artifacts.manifest import read_manifest
from vlm.errors import CheckpointError
from vlm.export.run import export_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of training with cache/{llm,clip} and the exports of two runs."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = model_config(Path("cache"))
        write_run(Path("cache/runs/x"), config)
        first = export_run(Path("cache/runs/x"))
        write_run(Path("cache/runs/y"), config, init_from=first)
        export_run(Path("cache/runs/y"))
    return folder


@pytest.fixture
def root(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder; the current folder is another one."""
    shutil.copytree(trained, tmp_path / "training")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "training"


@pytest.mark.slow
def test_base_models_are_found_above_the_export(root):
    image = write_image(root / "a.png")
    export = root / "cache/runs/x/export"
    model = vlm.load(export, precision="fp32")
    assert model.config.llm.path == str(root / "cache/llm")
    assert isinstance(model.chat("What is this?", [image], max_new_tokens=2), str)
    assert vlm.load("../training/cache/runs/x/export", precision="fp32").config == model.config


@pytest.mark.slow
def test_what_exists_here_goes_before_what_is_above(root, monkeypatch):
    monkeypatch.chdir(root)
    manifest = read_manifest(Path("cache/runs/x/export"))
    assert with_bases_found(manifest, Path("cache/runs/x/export")).model == manifest.model


@pytest.mark.slow
def test_an_adapter_that_went_on_training_the_exports_own_is_known_from_anywhere(root, monkeypatch):
    export, more = root / "cache/runs/x/export", root / "cache/runs/y/export"
    manifest = read_manifest(export)
    adapter = read_adapter(more, export, manifest)
    assert with_start_found(adapter, export, manifest).replaces_own
    other = root / "cache/runs/y/export"
    assert not with_start_found(replace(adapter, replaces_own=False), other, read_manifest(other)).replaces_own


@pytest.mark.slow
def test_a_base_model_that_is_nowhere_says_where_it_was_looked_for(root):
    (root / "cache/llm").rename(root / "moved")
    with pytest.raises(CheckpointError) as caught:
        vlm.load(root / "cache/runs/x/export")
    assert str(caught.value).endswith(
        f"the base model cache/llm of this export is looked for in {Path.cwd()} and above the export; run from the "
        "folder of training, or make a whole one there with vlm export RUN --full"
    )


@pytest.mark.slow
def test_a_name_of_a_hub_stays_a_name(root):
    export = root / "cache/runs/x/export"
    manifest = read_manifest(export)
    llm = manifest.model.llm.model_copy(update={"path": "Qwen/Qwen2.5-7B-Instruct"})
    named = replace(manifest, model=manifest.model.model_copy(update={"llm": llm}))
    assert with_bases_found(named, export).model.llm == llm
