"""Wrong records and hostile images among good ones (scripts/fuzz_data.py)."""

from __future__ import annotations

import pytest
from fuzz_data import byte_tokenizer, read_source, write_source


def test_the_run_ends_each_skip_is_named_and_nothing_unread_is_learned(tmp_path):
    outcome = read_source(write_source(tmp_path / "fuzz", 0, 40, 120, 30), byte_tokenizer())
    assert outcome.problems == []
    assert outcome.num_learned >= 40
    assert outcome.num_learned + outcome.by_rule.total() == outcome.num_records == 190
    assert len(outcome.by_rule) >= 12


@pytest.mark.thorough
@pytest.mark.slow  # measured: 2 minutes on a busy core
def test_two_thousand_records_and_five_hundred_images(tmp_path):
    outcome = read_source(write_source(tmp_path / "fuzz", 7, 1000, 2000, 500), byte_tokenizer())
    assert outcome.problems == []
    assert outcome.num_learned >= 1000
    assert outcome.by_rule["image_unreadable"] > 100
