"""scripts/prove_exports.py on a sample: an encoder of each backend, a decoder of each way to be exported."""

from __future__ import annotations

from pathlib import Path

import prove_exports
import pytest
from prove_exports import CHOICES, DECODERS, HF, OPEN_CLIP, TIMM, Row, as_markdown, prove

LAYOUTS = {
    "test_vit3": "vlm", "mobilevit_xxs": "vlm", "siglip:image_size=42": "llava", "dinov2:layer=-2": "vlm",
    "open_clip": "vlm", "llama": "llava",
    "phi": "vlm",  # a bias in the head
    "falcon_h1": "vlm",  # embeddings of other names than LLaVA's class knows, and a factor
}  # fmt: skip


@pytest.mark.one_in(8)
@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_of_its_exports_reads_back(name: str, tmp_path: Path):
    row = prove(name, tmp_path)
    assert not row.failed, row
    assert len(row.cells) == (3 if name in DECODERS else 2)
    assert row.cells[0].endswith(LAYOUTS[name])
    assert all(float(cell.split()[0]) < 1e-4 for cell in row.cells)  # worst seen: see docs/exports.md


def test_there_are_as_many_as_the_issue_asks_for():
    assert (len(TIMM), len(HF), len(OPEN_CLIP), len(DECODERS)) == (46, 12, 3, 40)
    assert len(set(CHOICES)) == len(CHOICES)


def test_what_cannot_be_built_is_a_failed_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prove_exports, "DECODERS", ["no_such_type"])
    row = prove("no_such_type", tmp_path)
    assert row.failed
    assert row.shape == "not built"


def test_the_table_counts_what_it_lists():
    rows = [
        Row("test_vit", "160 px, 100 patches", ["0e+00 vlm", "0e+00"]),
        Row("phi", "PhiForCausalLM", ["0e+00 vlm", "FAILED CheckpointError: no", "0e+00"], failed=True),
    ]
    text = as_markdown(rows, 3.0)
    assert "**1 encoders and 1 decoders; 1 with an export that is not read back.**" in text
    assert "| `phi` | PhiForCausalLM | 0e+00 vlm | FAILED CheckpointError: no | 0e+00 |" in text
