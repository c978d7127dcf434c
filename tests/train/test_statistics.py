"""Batch-norm statistics of a trained encoder on two ranks, of which one may have no image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launched import launch
from safetensors.torch import save_file
from torch import nn

from vlm.config import load_config
from vlm.distributed import rank
from vlm.prepare import prepare_run
from vlm.train.statistics import average_statistics


def norms(training: bool = True) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(1)).train(training)


def test_one_process_keeps_its_own_statistics():
    model = norms()
    model[0](torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    average_statistics(model)
    assert model[0].running_mean.tolist() == pytest.approx([0.2, 0.4])  # a tenth of the way from 0 to the mean


def test_what_is_measured_before_the_first_step_moves_no_statistics(config_file, tmp_path: Path):
    """The projector's channel statistics are taken with the encoder in evaluation mode, by rank 0 alone."""
    import timm

    cnn = timm.create_model("test_resnet", num_classes=0)
    settings = {key: cnn.pretrained_cfg[key] for key in ("input_size", "mean", "std", "first_conv", "classifier")}
    record = {"architecture": "test_resnet", "num_classes": 0, "pretrained_cfg": settings | {"num_classes": 0}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    save_file(cnn.state_dict(), tmp_path / "model.safetensors")
    vision = {"backend": "timm", "path": str(tmp_path), "image_size": 64}
    path = config_file(model__vision=vision, model__lora=None, model__trainable=["projector", "vision"])
    model = prepare_run(load_config(path), torch.device("cpu")).built.model
    assert model.projector.feature_mean.any()
    before, after = cnn.state_dict(), model.vision.trunk.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if "running" in name)


def look(_: Any) -> None:
    model, frozen = norms(), norms(training=False)
    if rank() == 0:  # the other has no image in this step
        model[0](torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
        frozen[0].running_mean.fill_(5.0)
    average_statistics(nn.ModuleList([model, frozen]))
    assert torch.allclose(model[0].running_mean, torch.tensor([0.1, 0.2]))
    assert torch.allclose(model[0].running_var, torch.tensor([1.05, 1.35]))  # of rank 0: 0.9 + 0.1 * (2, 8)
    assert model[0].num_batches_tracked == 1
    assert frozen[0].running_mean.tolist() == [5.0 * (1 - rank())] * 2
    assert dist.get_world_size() == 2


@pytest.mark.slow
def test_ranks_average_the_statistics_of_what_trains():
    launch(look, None)
