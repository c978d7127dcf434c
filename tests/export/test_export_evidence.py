"""proof.json and the figures of `vlm eval` go with an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_export import model_config, write_run

from vlm.artifacts.evidence import write_figures
from vlm.export.run import export_run

ROW = {
    "task": "talk", "kind": "loss", "metric": "loss per token", "own": 1.15, "own_standard_error": 0.05,
    "shuffled": 1.95, "shuffled_standard_error": 0.04, "blank": None, "baseline": None, "baseline_name": "",
    "num_records": 523,
}  # fmt: skip
LINE = "| talk | loss per token | 1.150 ± 0.050 | 1.950 ± 0.040 | - |  | 523 |"


def check(name: str, passed: bool | None) -> dict[str, Any]:
    return {"name": name, "passed": passed}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Of 7 steps, proven."""
    write_run(tmp_path / "run", model_config(tmp_path))
    checks = [check("labels", True), check("causal", True), check("initial_weights", None)]
    proof = {"passed": True, "computed_in": "float32", "device": "cpu", "versions": {"vlm": "9"}, "checks": checks}
    (tmp_path / "run/proof.json").write_text(json.dumps(proof))
    return tmp_path / "run"


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_an_export_holds_the_proof_and_its_card_sums_it_up(run: Path, full: bool):
    export = export_run(run, full=full)
    assert (export / "proof.json").read_text() == (run / "proof.json").read_text()
    card = (export / "README.md").read_text()
    assert "(`proof.json`): 2 checks passed, 0 failed. Computed in float32 on cpu with vlm 9." in card
    assert "Not made: initial_weights." in card


@pytest.mark.slow
def test_a_proof_that_failed_stands_in_the_card_as_such(run: Path):
    proof = json.loads((run / "proof.json").read_text())
    proof["checks"].append(check("packed_alone", False))
    (run / "proof.json").write_text(json.dumps(proof))
    assert "**Failed**, and trained all the same: packed_alone." in (export_run(run) / "README.md").read_text()


@pytest.mark.slow
def test_a_run_without_a_proof_is_exported_without_one(run: Path):
    (run / "proof.json").unlink()
    export = export_run(run)
    assert not (export / "proof.json").exists()
    assert "## Proof" not in (export / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "is_shown"), [(7, True), (6, False)])
def test_figures_go_into_the_card_if_they_are_of_these_weights(run: Path, steps: int, is_shown: bool):
    (run / "evaluation.json").write_text(json.dumps({"steps": steps, "results": [ROW]}))
    assert (LINE in (export_run(run) / "README.md").read_text()) is is_shown


def test_later_figures_replace_earlier_ones_and_leave_the_rest_of_the_card(run: Path):
    export = export_run(run)
    before = (export / "README.md").read_text()
    write_figures(export, [{**ROW, "own": 3.0}])
    write_figures(export, [ROW])
    card = (export / "README.md").read_text()
    assert card.count("| talk |") == 1
    assert LINE in card
    assert card.partition("<!-- vlm eval -->")[0] == before.partition("<!-- vlm eval -->")[0]
    assert card.partition("<!-- end of vlm eval -->")[2] == before.partition("<!-- end of vlm eval -->")[2]
