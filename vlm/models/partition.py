"""Parameters of which each rank holds a piece, under ZeRO stage 3 and `fully_shard`: their shape, and writing them.

DeepSpeed keeps a flat, equal piece per rank in `ds_tensor`, the last one padded; `fully_shard` keeps rows of a DTensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def full_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of all pieces [...] together."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


@torch.no_grad()
def write(parameter: Tensor, values: Tensor) -> None:
    """Copy a whole tensor [...] into a parameter, of which this rank may hold a piece. Communicates nothing."""
    for own, new in _pieces(parameter, values):
        own.copy_(new)


@torch.no_grad()
def add(parameter: Tensor, values: Tensor) -> None:
    """Add a whole tensor [...] to a parameter, of which this rank may hold a piece. Communicates nothing."""
    for own, new in _pieces(parameter, values):
        own.add_(new.to(own.device, own.dtype))


def _pieces(parameter: Any, values: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Whole values [...] -> (view of what this rank holds, what belongs there).

    One pair; two where DeepSpeed holds a gathered copy too.
    """
    from torch.distributed.tensor import DTensor  # late: 0.8 s

    if hasattr(parameter, "ds_tensor"):
        piece = parameter.ds_tensor.numel()
        new = values.reshape(-1)[torch.distributed.get_rank() * piece :][:piece]
        gathered = [(parameter.data.view(-1), values.reshape(-1))] if parameter.data.numel() == values.numel() else []
        return [(parameter.ds_tensor[: new.numel()], new), *gathered]
    if isinstance(parameter, DTensor):
        own = parameter.to_local()
        rows = -(-parameter.shape[0] // parameter.device_mesh.size())  # as torch.chunk cuts
        return [(own, values[parameter.device_mesh.get_local_rank() * rows :][: own.shape[0]])]
    return [(parameter, values)]
