"""Which exports a page offers, and which of them are in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm.apps.web.models import ModelStore, find_exports


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name in ("b/finetune/export", "a/export-full", "b/pretrain/export", ".old/export", "b/.tmp-export-1"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "vlm.json").write_text("{}")
    return tmp_path / "runs"


def test_exports_are_found_by_name_and_half_written_ones_are_not(runs: Path):
    found = find_exports(None, runs)
    assert [export.label for export in found] == ["a/export-full", "b/finetune", "b/pretrain"]
    assert found[1].path == runs / "b/finetune/export"


def test_the_named_export_comes_first_and_once(runs: Path, tmp_path: Path):
    assert [export.label for export in find_exports(runs / "b/pretrain/export", runs)] == [
        "b/pretrain", "a/export-full", "b/finetune"
    ]  # fmt: skip
    elsewhere = tmp_path / "other" / "export"
    assert find_exports(elsewhere, runs)[0].path == elsewhere
    assert len(find_exports(elsewhere, None)) == 1


def store(runs: Path, max_loaded: int) -> tuple[ModelStore, list[str]]:
    loads: list[str] = []

    def load(path: Path, on_progress: Callable[[float], None]) -> Any:
        loads.append(path.parent.name)
        on_progress(1.0)
        return object()

    return ModelStore(find_exports(None, runs), max_loaded=max_loaded, load_export=load), loads


@pytest.mark.slow
def test_a_model_is_loaded_once_and_the_one_asked_longest_ago_goes(runs: Path):
    models, loads = store(runs, max_loaded=2)
    first = models.get(0)
    assert models.get(0) is first
    models.get(1)
    models.get(0)
    models.get(2)  # in the place of 1
    models.get(0)
    models.get(1)
    assert loads == ["a", "finetune", "pretrain", "finetune"]


def test_no_more_than_the_limit_is_in_memory_while_another_loads(runs: Path):
    held: list[list[int]] = []

    def load(path: Path, on_progress: Callable[[float], None]) -> Any:
        held.append([number for number in range(3) if models.is_loaded(number)])
        return object()

    models = ModelStore(find_exports(None, runs), max_loaded=1, load_export=load)
    models.get(0)
    models.get(1)
    assert held == [[], []]


def test_what_was_unloaded_is_loaded_again_when_it_is_asked(runs: Path):
    models, loads = store(runs, max_loaded=2)
    models.get(0)
    models.get(1)
    assert (models.unload(), models.is_loaded(0), models.unload()) == (2, False, 0)
    models.get(0)
    assert loads == ["a", "finetune", "a"]


def test_one_at_a_time(runs: Path):
    models, _ = store(runs, 1)
    assert not models.is_busy
    with models.turn():
        assert models.is_busy
    assert not models.is_busy
