"""A micro-batch goes forward and backward without asking the device for a number.

Tensors on the meta device have no numbers: `.item()`, `nonzero` and indexing by a mask fail there, where on a GPU they
would wait.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from test_pipeline_layers import ADAPTERS, BATCHES, EVERYTHING, IMAGE, packed
from tiny_models import changed

from vlm.batch import Batch
from vlm.models.build import build_model
from vlm.models.config import ModelConfig
from vlm.models.pipeline import pipeline_layers, run_layers
from vlm.models.segments import decode_one_by_one
from vlm.objectives.base import Head
from vlm.objectives.lm import LanguageModeling
from vlm.train.engines.base import LossModule

META = torch.device("meta")


def shared_image() -> Batch:
    """The second record stands without the image of the first."""
    batch = packed([[20, 12, 8]], (0,))
    batch.position_ids[0, 20:32] += 16
    return batch


def model_on_meta(config: ModelConfig, **changes: Any) -> Any:
    model = build_model(changed(config, **changes)).model.to(META).train()
    model.image_token_id = IMAGE
    return model


@pytest.mark.one_in(3)
@pytest.mark.parametrize("batch", [*BATCHES.values(), shared_image()], ids=[*BATCHES.keys(), "a shared image"])
@pytest.mark.parametrize("changes", [ADAPTERS, EVERYTHING, {"gradient_checkpointing": True, **EVERYTHING}])
def test_nothing_is_read_from_the_device(config: ModelConfig, batch: Batch, changes: Any, monkeypatch: Any):
    monkeypatch.setattr("vlm.train.engines.base.autocast", lambda *_: nullcontext())  # torch's does not know meta
    model = model_on_meta(config, **changes)
    loss, _ = LossModule(model, LanguageModeling())(batch.to(META))
    loss.backward()
    assert all(p.grad.is_meta for p in model.parameters() if p.requires_grad)


def test_nor_in_a_pipeline(config: ModelConfig):
    model, batch = model_on_meta(config, **EVERYTHING), BATCHES["packed, with images"].to(META)
    hidden = run_layers(model, pipeline_layers(model), batch)
    LanguageModeling().loss(hidden, batch, Head(model.logits)).loss.backward()
    assert all(p.grad.is_meta for p in model.parameters() if p.requires_grad)


def test_nor_where_records_go_through_the_decoder_one_by_one():
    embeddings, positions = torch.zeros(1, 5, 2, device=META), torch.tensor([[0, 1, 2, 0, 1]])
    assert decode_one_by_one(lambda rows, _: rows.cumsum(1), embeddings, positions).shape == (1, 5, 2)
