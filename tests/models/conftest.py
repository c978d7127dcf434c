"""One tiny model for the tests of this package."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import write_llm, write_vision

from vlm.models.config import ModelConfig


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_vision(tmp_path / "clip")


@pytest.fixture
def llm(tmp_path: Path) -> Path:
    return write_llm(tmp_path / "llm")


@pytest.fixture
def config(clip: Path, llm: Path) -> ModelConfig:
    """CLIP, a linear projector and Llama; 16 tokens an image; only the projector trains."""
    return ModelConfig.model_validate(
        {"vision": {"backend": "hf", "path": str(clip), "layer": -2}, "llm": {"path": str(llm)}}
    )
