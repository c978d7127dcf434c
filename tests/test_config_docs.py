"""docs/config.md names every key with its values and default."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts/config_table.py"


def test_the_tables_of_the_document_are_those_of_the_config_classes():
    spec = importlib.util.spec_from_file_location("config_table", SCRIPT)
    config_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(config_table)
    document = config_table.DOCUMENT.read_text(encoding="utf-8")
    assert document == config_table.with_tables(document), "run: python scripts/config_table.py"
