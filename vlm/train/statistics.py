"""Batch-norm statistics of an encoder that trains on several ranks.

Each rank normalises with its own images and moves its own running means. After every step these are averaged over the
ranks, so that all hold the same model, and a checkpoint what all have seen, not what rank 0 has. Normalising over all
ranks' images (SyncBatchNorm) would need an image on every rank in every micro-batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def average_statistics(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Average the running means and variances of the batch norms that train; the count is the largest.

    Args:
        group: of the ranks that hold the same part of the model; None is all.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    if not norms:
        return
    statistics = [s for norm in norms for s in (norm.running_mean, norm.running_var) if s is not None]
    flat = torch.cat([values.float() for values in statistics])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    for values, averaged in zip(statistics, flat.split([len(values) for values in statistics]), strict=True):
        values.copy_(averaged)
    counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    if counts:
        largest = torch.stack(counts)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        for count, value in zip(counts, largest, strict=True):
            count.copy_(value)
