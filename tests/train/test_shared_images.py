"""Records that share an image's tokens: one step gives the loss and the gradients of the records apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm.config import load_config
from vlm.prepare import Prepared, prepare_run
from vlm.run import run_identity
from vlm.settle import FIRST_WITH_SHARING, settle_precision
from vlm.train.engines.base import Engine

NUM_IMAGES, QUESTIONS = 3, ("What is it?", "Which color has it?", "Describe it.", "Is it red or blue?")


@pytest.fixture
def path(config_file: Any, tiny: Path, tmp_path: Path) -> Path:
    """Four conversations about each of three images, and two without any."""
    images = sorted((tiny / "data/images").glob("*.png"))[:NUM_IMAGES]
    records = [
        {"image": image.name, "conversations": [{"from": "human", "value": f"<image>\n{question}"},
                                                {"from": "gpt", "value": f"red circle {n}"}]}
        for n, question in enumerate(QUESTIONS)
        for image in images
    ]  # fmt: skip
    records += [{"conversations": [{"from": "human", "value": "Say red"}, {"from": "gpt", "value": "red"}]}] * 2
    (tmp_path / "data.json").write_text(json.dumps(records))
    return config_file(
        data__sources=[{"path": str(tmp_path / "data.json"), "images": str(tiny / "data/images")}],
        data__held_out=0.0, data__max_length=256, model__lora__dropout=0.0, model__projector__normalize=False,
        train__global_batch_size=16, train__micro_batch_size=16,
    )  # fmt: skip


def prepared(path: Path, *overrides: str) -> Prepared:
    return prepare_run(load_config(path, list(overrides)), torch.device("cpu"))


def step(parts: Prepared) -> tuple[float, float, int, dict[str, torch.Tensor], int]:
    """Loss and norm of the first step, its number of labels, the trained weights after it, and tokens computed."""
    engine: Engine = parts.engine
    batches = next(parts.data.train.iterate())
    normalizer = sum(parts.objective.normalizer(batch) for batch in batches)
    output = engine.train_step(batches, normalizer, 1.0)
    weights = {name: p.detach().clone() for name, p in parts.built.model.named_parameters() if p.requires_grad}
    return output.loss, output.grad_norm, normalizer, weights, sum(b.input_ids.numel() - b.num_padding for b in batches)


def test_a_step_is_the_same_and_computes_each_image_once(path: Path, capsys: pytest.CaptureFixture[str]):
    together, apart = prepared(path), prepared(path, "data.share_images=false")
    found, expected = step(together), step(apart)
    assert found[2] == expected[2] > 40
    assert abs(found[0] - expected[0]) < 1e-6 * expected[0]  # worst seen: 2e-7
    assert abs(found[1] - expected[1]) < 1e-5 * expected[1]
    for name, weight in expected[3].items():
        assert (found[3][name] - weight).abs().max() < 1e-6, name
    stem = int(together.data.train.order.scan.shares.stems.max())
    assert expected[4] - found[4] == NUM_IMAGES * (len(QUESTIONS) - 1) * stem
    said = f"9 records share the image of another one: {9 * stem:,} tokens fewer an epoch"
    assert said in capsys.readouterr().err


def test_nothing_is_shared_where_attention_has_masks_or_rows_hold_one_record(path: Path):
    for override in ("model.llm.attention=sdpa", "data.packing=false", "data.share_images=false"):
        order = prepared(path, override).data.train.order
        assert (order.shares_images, order.num_shared(0)) == (False, (0, 0)), override


def test_a_run_that_began_without_it_goes_on_without_it(path: Path):
    config = load_config(path)
    began = {key: value for key, value in run_identity(config).items() if key != FIRST_WITH_SHARING}
    older = settle_precision(config, torch.device("cpu"), began)
    assert (older.data.share_images, older.model.llm.attention) == (False, "sdpa")
    newer = settle_precision(config, torch.device("cpu"), run_identity(config))
    assert (newer.data.share_images, newer.model.llm.attention) == (True, "auto")
