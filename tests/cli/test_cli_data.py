"""`vlm data check | preview | stats` on the tiny project's parts."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from prepare_tiny import write_parts


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny project's paths exist."""
    folder = tmp_path_factory.mktemp("tiny")
    write_parts(folder / "cache/tiny")
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


def test_data_files_are_made_of_data_files(tmp_path, monkeypatch, vlm):
    monkeypatch.chdir(tmp_path)
    Path("unique.json").write_text('[{"instruction": "Who are you?", "output": "小明"}, {"messages": 3}]')
    code, out, _ = vlm("data", "repeat", "-i", "unique.json", "-o", "repeated.json", "-n", "200")
    assert (code, out) == (0, "2 records read, 400 to repeated.json, skipped: none\n")
    code, out, _ = vlm("data", "convert", "-i", "unique.json", "-o", "chat.jsonl", "--to", "openai")
    assert (code, "[bad_turns]" in out, "1 to chat.jsonl, skipped: bad_turns 1" in out) == (0, True, True)
    code, _, err = vlm("data", "convert", "-i", "unique.json", "-o", "chat.jsonl", "--to", "openai")
    assert (code, "chat.jsonl exists and is not overwritten" in err) == (2, True)
    code, _, err = vlm("data", "convert", "-i", "unique.json", "-o", "b.json", "--to", "xml", "--column", "image:img")
    assert (code, "--column image:img: expected two names" in err) == (2, True)
    code, _, err = vlm("data", "split", "-i", "unique.json")
    assert (code, "cannot be split" in err) == (3, True)
    Path("unique.json").write_text('[{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]')
    code, out, _ = vlm("data", "split", "-i", "unique.json", "--share", "0.5")
    assert (code, "1 to unique.train.jsonl, 1 to unique.held_out.jsonl" in out) == (0, True)
