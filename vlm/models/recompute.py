"""Gradient checkpointing of a trained encoder: its blocks are computed again in the backward pass.

The libraries' own switches do not reach every way of calling their networks, so blocks are found by looking and their
forward is wrapped. A batch norm's statistics move in the first forward only, not when it is computed again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

RECOMPUTES = "recomputes_activations"  # attribute of a block that does
_LISTS = (nn.ModuleList, nn.Sequential)
_FEWEST = 6  # units; one of them is computed again at a time


def checkpoint_blocks(trunk: nn.Module) -> list[str]:
    """Have every block of an encoder keep its input only, while it trains.

    Returns:
        the blocks' names.
    """
    blocks = find_units(trunk)
    for block in blocks.values():
        block.forward = partial(_forward, block, block.forward)  # type: ignore[method-assign]
        setattr(block, RECOMPUTES, True)
    return list(blocks)


def find_units(trunk: nn.Module) -> dict[str, nn.Module]:
    """Name -> block: what is repeated in the network. Few of them are stages, so their blocks are taken instead.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.norm, self.attention, self.mlp = nn.LayerNorm(2), nn.Linear(2, 2), nn.Linear(2, 2)
    >>> list(find_units(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Sequential(Block(), Block()))))
    ['1.0', '1.1']
    """
    units = dict(_repeated(trunk, ""))
    while len(units) < _FEWEST:
        inner: dict[str, nn.Module] = {}
        for name, unit in units.items():
            inner |= dict(_repeated(unit, f"{name}.")) or {name: unit}
        if len(inner) <= len(units):
            break
        units = inner
    return units


def _repeated(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost members of lists, and children of one class, that are more than a layer and its norm."""
    classes = Counter(type(child) for child in module.children())
    for name, child in module.named_children():
        if _is_composite(child) and (isinstance(module, _LISTS) or classes[type(child)] > 1):
            yield f"{prefix}{name}", child
        else:
            yield from _repeated(child, f"{prefix}{name}.")


def _is_composite(module: nn.Module) -> bool:
    """Whether at least three modules in it have weights of their own."""
    holders = (inner for inner in module.modules() if next(inner.parameters(recurse=False), None) is not None)
    return not isinstance(module, _LISTS) and len(list(islice(holders, 3))) == 3


def _forward(block: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    args = tuple(list(value) if isinstance(value, list) else value for value in args)  # DenseNet's grows afterwards
    return checkpoint(
        forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _still_statistics(block)), **kwargs
    )


@contextmanager
def _still_statistics(block: nn.Module) -> Iterator[None]:
    """Running means stay as they are: with a momentum of 0 they move by nothing."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, _, count in before:
        norm.momentum = 0.0
        norm.num_batches_tracked = None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count
