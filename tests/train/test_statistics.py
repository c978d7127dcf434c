"""Batch-norm statistics of a trained encoder on two ranks, of which one may have no image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from launched import launch
from torch import nn

from vlm.distributed import rank
from vlm.train.statistics import average_statistics


def norms(training: bool = True) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(1)).train(training)


def test_one_process_keeps_its_own_statistics():
    model = norms()
    model[0](torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    average_statistics(model)
    assert model[0].running_mean.tolist() == pytest.approx([0.2, 0.4])  # a tenth of the way from 0 to the mean


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
