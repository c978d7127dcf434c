"""Leaving a model as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vlm.models.build import forked_random_state
from vlm.models.recompute import RECOMPUTES

_MARKS = ("gradient_checkpointing", RECOMPUTES)  # of transformers' blocks, and of an encoder's


@contextmanager
def unchanged(model: nn.Module, seed: int) -> Iterator[None]:
    """Afterwards modes, buffers and torch's random state are what they were, and no parameter has a gradient.

    Args:
        seed: of the random numbers inside, which are thrown away.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = buffers_of(model)
    with forked_random_state():
        torch.manual_seed(seed)
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
            restore(model, buffers)
            for module, was in modes:
                module.training = was


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, but blocks that compute their activations again in the backward pass still do."""
    modes = [(module, module.training) for module in model.modules()]
    blocks = [module for module in model.modules() if any(getattr(module, mark, False) for mark in _MARKS)]
    own = [(block, block.dropout) for block in blocks if isinstance(getattr(block, "dropout", None), float)]  # OPT
    model.eval()
    for block in blocks:  # it is asked for the mode of the block alone
        block.training = True
    for block, _ in own:
        setattr(block, "dropout", 0.0)  # noqa: B010  a module's attributes are typed as modules
    try:
        yield
    finally:
        for block, was in own:
            setattr(block, "dropout", was)  # noqa: B010
        for module, was_training in modes:
            module.training = was_training


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Name -> [...], copies of what a forward pass may change besides its output: statistics. Tables are left out."""
    stored = model.state_dict(keep_vars=True).keys()
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name in stored}


@torch.no_grad()
def restore(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Write back what `buffers_of` gave, name -> [...]; those that did not change are not touched."""
    for name, values in buffers.items():
        buffer = model.get_buffer(name)
        if not torch.equal(buffer, values):
            buffer.copy_(values)
