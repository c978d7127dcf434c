"""The estimate against what a step takes: the bytes of all living tensors, counted at every operator (LiveBytes)."""

from __future__ import annotations

import bench_plan
import pytest
from bench_plan import SMALL, Case, LiveBytes, estimated, measure

# Two blocks of width 256 and short rows, quick enough for every run; worst of the five when written: 1.3 %
_LLM = bench_plan.llm(256, 704, 2, 4, 2, 1000)
QUICK = (
    Case("projector", _LLM, ("projector",), 1, 256, bench_plan._CLIP, 1),
    Case("lora", _LLM, ("llm.lora",), 1, 256, lora={"rank": 8}, checkpointing=True),
    Case("full", _LLM, ("llm",), 1, 256),
    Case("full, masks", _LLM, ("llm",), 1, 256, attention="sdpa"),
    Case("full, fp32, accumulation", _LLM, ("llm",), 1, 256, precision="fp32", micro_batches=2),
)


def test_live_bytes_counts_storages_while_they_live():
    import torch

    with LiveBytes() as counter:
        first = torch.zeros(100)
        second = first.view(10, 10)  # the same storage
        assert (counter.live, counter.peak) == (400, 400)
        third = first + 1
        del first
        assert (counter.live, counter.peak) == (800, 800)
        del second, third
    assert (counter.live, counter.peak) == (0, 800)


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_small_models_within_5_percent(case):
    assert estimated(case)["total"] == pytest.approx(measure(case, "cpu")["measured"], rel=0.05)


# Peaks of 150 to 1,150 MiB; worst of all 22 when written: 2.7 %, docs/plan.md has the table, scripts/bench_plan.py all
@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("case", SMALL[1::3], ids=lambda case: case.name)
def test_models_of_the_bench_within_5_percent(case):
    assert estimated(case)["total"] == pytest.approx(measure(case, "cpu")["measured"], rel=0.05)
