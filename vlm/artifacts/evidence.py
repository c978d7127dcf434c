"""What is known of a run's quality, for its export: proof.json as it is, and both summed up in the model card.

`vlm eval` measures an export that is there already, so it writes its table into the card itself.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.files import write_atomically
from vlm.logs import warn

PROOF = "proof.json"  # in a run folder, see vlm.proof; and in its exports
FIGURES = "evaluation.json"  # beside an export, see vlm.evaluation
CARD = "README.md"
_START, _END = "<!-- vlm eval -->", "<!-- end of vlm eval -->"
_NOT_YET = "Not measured yet: `vlm eval` on this folder writes its table here."
_HEAD = ("task", "figure", "own images", "shuffled images", "blank images", "baseline", "records")


def copy_proof(run: Path, export: Path) -> dict[str, Any] | None:
    """Copy the run's proof.json, if it has one. Returns what it says."""
    proof = _read(run / PROOF)
    if proof is not None:
        shutil.copyfile(run / PROOF, export / PROOF)
    return proof


def read_figures(run: Path, steps: object) -> list[dict[str, Any]]:
    """The rows of the run's evaluation.json, if they are of the weights after so many steps."""
    written = _read(run / FIGURES)
    return written["results"] if written is not None and steps is not None and written.get("steps") == steps else []


def evidence_sections(proof: dict[str, Any] | None, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of the model card."""
    shown = figures_table(rows) if rows else _NOT_YET
    lines = ["## Figures", "", _START, shown, _END, ""]
    return lines if proof is None else [*lines, "## Proof", "", *_proof_lines(proof), ""]


def write_figures(export: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put a table into an export's card, where an earlier one stands or none yet. A card without the marks is kept."""
    card = export / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    before, start, rest = text.partition(f"{_START}\n")
    _, end, after = rest.partition(f"\n{_END}")
    if start and end:
        try:
            write_atomically(card, f"{before}{start}{figures_table(rows)}{end}{after}")
        except OSError as error:  # somebody else's export
            warn(f"{card}: the figures could not be written into it ({error.strerror})")


def figures_table(rows: Sequence[dict[str, Any]]) -> str:
    """
    >>> print(figures_table([{"task": "talk", "metric": "loss per token", "own": 1.15, "own_standard_error": 0.05,
    ...     "shuffled": 1.95, "shuffled_standard_error": 0.04, "blank": 1.7, "blank_standard_error": 0.04,
    ...     "baseline": None, "baseline_name": "", "num_records": 523}]))
    | task | figure | own images | shuffled images | blank images | baseline | records |
    |---|---|---|---|---|---|---|
    | talk | loss per token | 1.150 ± 0.050 | 1.950 ± 0.040 | 1.700 ± 0.040 |  | 523 |
    """
    lines = [f"| {' | '.join(_HEAD)} |", "|" + "---|" * len(_HEAD)]
    for row in rows:
        figures = [with_error(row.get(key), row.get(f"{key}_standard_error")) for key in ("own", "shuffled", "blank")]
        baseline = "" if row["baseline"] is None else f"{row['baseline']:.3f} ({row['baseline_name']})"
        lines.append(f"| {' | '.join([row['task'], row['metric'], *figures, baseline, str(row['num_records'])])} |")
    return "\n".join(lines)


def _proof_lines(proof: dict[str, Any]) -> list[str]:
    names: dict[Any, list[str]] = {True: [], False: [], None: []}
    for check in proof["checks"]:
        names[check["passed"]].append(check["name"])
    versions = ", ".join(f"{name} {version}" for name, version in proof["versions"].items())
    lines = [
        f"Before its first step the run was checked on its own model and records (`{PROOF}`): "
        f"{len(names[True])} checks passed, {len(names[False])} failed. "
        f"Computed in {proof['computed_in']} on {proof['device']} with {versions}.",
    ]
    if names[False]:
        lines += ["", f"**Failed**, and trained all the same: {', '.join(names[False])}."]
    return lines + (["", f"Not made: {', '.join(names[None])}."] if names[None] else [])


def with_error(value: float | None, error: float | None) -> str:
    """
    >>> with_error(0.715, 0.032)
    '0.715 ± 0.032'
    """
    if value is None:
        return "-"
    return f"{value:.3f}" + ("" if error is None or math.isnan(error) else f" ± {error:.3f}")


def _read(path: Path) -> dict[str, Any] | None:
    """None for a file that is not there or damaged: an export does not fail because of it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
