"""A tiny decoder whose numbers can be checked by hand."""

from __future__ import annotations

from pathlib import Path

import bench_plan
import pytest
from bench_plan import Case

from vlm.config import RunConfig
from vlm.plan.shapes import LLMShape, read_shapes

# width 8, MLP 16, 2 blocks, 2 heads of 4, one for keys and values, 32 words
TINY = bench_plan.llm(8, 16, 2, 2, 1, 32)
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 7,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """CLIP, a two-layer projector and the tiny decoder with masks; 2 rows of 20 tokens, 16 an image; 4 rows a step."""
    extra = {"projector": {"kind": "mlp"}}
    case = Case("", TINY, ("projector",), 2, 20, CLIP, 1, micro_batches=2, extra=extra, attention="sdpa")
    return bench_plan.write_config(case, tmp_path)


@pytest.fixture
def shape(config: RunConfig) -> LLMShape:
    return read_shapes(config.model).llm


def changed(config: RunConfig, **sections: dict[str, object]) -> RunConfig:
    """The config with other values, validated again."""
    values = config.model_dump()
    for name, changes in sections.items():
        values[name] |= changes
    return RunConfig.model_validate(values)
