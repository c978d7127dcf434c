"""`vlm data make` against `vlm serve`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from api_server import NAME, Running

from vlm.cli.main import main
from vlm.data.make import MakeSettings, make_records


def test_our_own_server_answers_in_the_form_that_is_asked_for(server: Running, export: Path, tmp_path: Path):
    for number in range(3):
        (tmp_path / "images").mkdir(exist_ok=True)
        shutil.copy(export.parents[1] / f"{number}.png", tmp_path / "images")
    settings = MakeSettings(
        f"{server.url}/v1", pairs=1, parallel=2, max_tokens=200, most_letters=(6, 6), temperature=1.0
    )
    out = tmp_path / "pairs.jsonl"
    made = make_records(tmp_path / "images", out, tmp_path / "prompt.txt", settings)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert made.num_requests == 3
    assert made.num_written == len(records) >= 1, made.skips
    for record in records:
        question, answer = (turn["value"] for turn in record["conversations"])
        assert question.startswith("<image>\n")
        assert 1 <= len(answer) <= 6


def test_a_model_that_does_not_know_the_form_is_counted_not_learned(
    server: Running, export: Path, tmp_path: Path, capsys
):
    (tmp_path / "images").mkdir()
    shutil.copy(export.parents[1] / "0.png", tmp_path / "images")
    out = tmp_path / "pairs.jsonl"
    arguments = ["--api-base", f"{server.url}/v1", "--model", NAME, "-o", str(out), "--free-form", "--max-tokens", "8"]
    with pytest.raises(SystemExit) as end:
        main(["data", "make", str(tmp_path / "images"), *arguments])
    assert end.value.code == 0
    assert "1 images, 0 done before, 0 records with 0 pairs made by 1 requests, skipped: " in capsys.readouterr().out
    assert out.read_text() == ""
