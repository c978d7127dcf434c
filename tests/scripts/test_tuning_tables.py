import pytest
import tuning_tables


@pytest.mark.slow
def test_the_tables_of_the_document_are_what_plan_and_models_say():
    document = tuning_tables.DOCUMENT.read_text(encoding="utf-8")
    assert document == tuning_tables.with_tables(document), "run: python scripts/tuning_tables.py"
