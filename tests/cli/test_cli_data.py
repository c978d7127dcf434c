"""`vlm data check | preview | stats` on the tiny project's parts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny project's paths exist."""
    folder = tmp_path_factory.mktemp("tiny")
    subprocess.run(
        [sys.executable, REPOSITORY / "scripts/prepare_tiny.py", "--folder", folder / "cache/tiny"],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


@pytest.mark.slow
def test_data_verbs_show_what_training_will_see(tiny, monkeypatch, vlm):
    monkeypatch.chdir(tiny)
    code, out, _ = vlm("data", "check", "tiny/pretrain")
    assert (code, "skipped: none" in out) == (0, True)
    code, out, _ = vlm("data", "preview", "tiny/finetune", "-n", "2")
    assert (code, out.count(" supervised")) == (0, 2)
    assert Image.open("preview.png").width > 0
    code, out, _ = vlm("data", "stats", "tiny/finetune")
    assert code == 0
    assert "full" in out


@pytest.mark.slow
def test_check_ends_with_3_when_the_images_are_gone(tiny, monkeypatch, vlm):
    monkeypatch.chdir(tiny)
    (tiny / "empty").mkdir()
    code, out, _ = vlm("data", "check", "tiny/pretrain", "-o", "data.sources[0].images=empty", "--out", "bad.jsonl")
    assert (code, "image_missing" in out) == (3, True)
    assert len(Path("bad.jsonl").read_text().splitlines()) > 20
