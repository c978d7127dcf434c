"""A kind of data file that only the tests know, from its check to the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from captions_file import Lines
from walk import walk

from vlm.cli.main import main
from vlm.data.records import SOURCES


@pytest.mark.slow
def test_it_needs_nothing_but_its_class(
    config_file: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(SOURCES, ".captions", lambda path, cache, name: Lines(path, name))
    images = sorted((tiny / "data/images").glob("*.png"))[:12]
    (tmp_path / "shapes.captions").write_text("".join(f"{image.name}\tIt is {image.stem}.\n" for image in images))
    source = {"path": str(tmp_path / "shapes.captions"), "images": str(tiny / "data/images"), "prompt": "What is it?"}
    path = config_file(data__sources=[source], data__held_out=0.0, train__max_steps=4, train__save_every=2)
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", str(path)])
    assert (ended.value.code, capsys.readouterr().out) == (0, "12 records, 12 images, skipped: none\n")
    walked = walk(path, images[0], capsys)
    assert "12 records, 0 skipped" in walked.log
    assert "shapes.captions" in walked.card
