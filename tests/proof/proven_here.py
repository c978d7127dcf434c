"""What test_proof_engines.py runs in each of several processes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch


def prove_here(argument: dict[str, Any]) -> None:
    """In each process: the names of what failed and of what was left out, written by each rank."""
    from launched import make

    from vlm.distributed import rank
    from vlm.proof.prove import prove

    if argument["leak"]:
        plant_a_leak()
    made = make(argument["config"], [])

    proof = prove(made, seconds=math.inf)
    left = [name for name, finding in proof.findings.items() if finding.passed is None]
    Path(argument["out"], f"{rank()}.json").write_text(json.dumps([proof.failed, left]))


def plant_a_leak() -> None:
    """Attention reads where records begin from positions that restart; here they do not, in any block."""
    from vlm.models import pipeline
    from vlm.models.vlm import VisionLanguageModel

    decode, run_blocks = VisionLanguageModel.decode, pipeline._run_blocks

    def straight(position_ids: torch.Tensor) -> torch.Tensor:
        return torch.arange(position_ids.shape[1]).expand_as(position_ids)

    VisionLanguageModel.decode = lambda self, states, positions, read=None: decode(
        self, states, straight(positions), read
    )
    pipeline._run_blocks = lambda model, blocks, positions, states: run_blocks(
        model, blocks, straight(positions), states
    )
