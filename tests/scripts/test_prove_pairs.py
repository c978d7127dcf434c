"""scripts/prove_pairs.py on a sample: adopted, trained, exported and read back, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from prove_pairs import DECODERS, ENCODERS, Row, as_markdown, prove

SAMPLE = ("siglip:phi3", "dinov3:gpt2", "convnext:bloom", "dinov2+siglip:llama")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.mark.one_in(4)
@pytest.mark.slow
@pytest.mark.parametrize("pair", SAMPLE)
def test_a_pair_trains_is_exported_and_read_back(pair: str, parts: Path):
    encoder, decoder = pair.split(":")
    row = prove(encoder, decoder, parts)
    assert (row.state, row.reason) == ("right", "")
    assert row.difference < 1e-5


@pytest.mark.slow
def test_a_decoder_that_cannot_be_right_is_refused_by_name(parts: Path):
    row = prove("clip", "gemma3n_text", parts)
    assert row.state == "refused"
    assert "it looks embeddings up by token id in every block, and images have none" in row.reason


def test_the_matrix_is_of_twelve_and_thirty_families():
    assert (len(set(ENCODERS)), len(set(DECODERS))) == (12, 30)


def test_the_table_counts_what_it_lists():
    why = "clip and g cannot be trained together; nothing was written: model.llm.path g: it cannot"
    rows = [
        Row("clip", "llama", "right"),
        Row("vit", "llama", "right", difference=2e-7),
        Row("clip", "g", "refused", why),
    ]
    text = as_markdown(rows, 3.0)
    assert "**2 pairs (66.7%) are right, 1 are refused by name, 0 are wrong.**" in text
    assert "| `llama` | 0 | 2e-07 |" in text
    assert "| `g` | any | it cannot |" in text
