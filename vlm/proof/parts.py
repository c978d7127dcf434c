"""Checks of what trains and what is frozen, and of the weights that a run starts with."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from vlm.artifacts.layouts import open_parts
from vlm.artifacts.llava import read_start
from vlm.errors import CheckpointError
from vlm.models.config import ModelConfig
from vlm.models.lora import is_adapter
from vlm.models.partition import full_shape
from vlm.models.trainable import canonical_name, part_of, part_weights
from vlm.models.vlm import VisionLanguageModel
from vlm.proof.checks import Finding, at_most, holds, not_made
from vlm.proof.forward import Bounds, Rows, within
from vlm.proof.probe import StateProbe, relative
from vlm.proof.state import buffers_of, restore


def check_trainable(
    model: VisionLanguageModel, trainable: Collection[str], optimizer: torch.optim.Optimizer | None
) -> Finding:
    """
    Args:
        optimizer: None where it holds other tensors than the model's parameters.
    """
    named = dict(model.named_parameters())
    freed = [name for name, parameter in named.items() if parameter.requires_grad and part_of(name) not in trainable]
    if freed:
        return holds(f"{canonical_name(freed[0])} and {len(freed) - 1} more train, model.trainable names no such part")
    for part in trainable:
        own = [parameter for name, parameter in named.items() if part_of(name) == part]
        if own and not any(parameter.requires_grad for parameter in own):
            return holds(f"{part} is frozen, model.trainable names it")
    if optimizer is None:
        return holds("")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {id(parameter): name for name, parameter in named.items() if parameter.requires_grad}
    left_out = [name for key, name in trained.items() if key not in held]
    if left_out:
        return holds(f"{canonical_name(left_out[0])} and {len(left_out) - 1} more train, the optimizer has them not")
    return holds("" if held <= trained.keys() else f"the optimizer holds {len(held - trained.keys())} frozen tensors")


@torch.no_grad()
def check_frozen(probe: StateProbe, rows: Rows, bounds: Bounds) -> Finding:
    """One forward pass in training mode, except of trained adapters, encoder and projector, against evaluation mode."""
    model = probe.model
    trained = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    batch = rows.packed.to(probe.device)
    sees = model.vision is not None and batch.pixel_values is not None and not {"vision", "vision.lora"} & trained
    if "llm" in trained and not sees:
        return not_made("nothing frozen is computed")
    model.eval()
    before = buffers_of(model)
    with probe.autocast():
        expected_features = model.vision(batch.pixel_values) if sees else None  # type: ignore[misc]
    expected = None if "llm" in trained else probe.states(rows.packed)
    _training_mode(model, trained)
    try:
        with probe.autocast():
            features = model.vision(batch.pixel_values) if sees else None  # type: ignore[misc]
        states = None if expected is None else probe.forward(rows.packed)
        after = buffers_of(model)
        moved = [name for name in after if part_of(name) not in trained and not torch.equal(after[name], before[name])]
    finally:
        restore(model, before)
        model.eval()
    if moved:
        return holds(f"{canonical_name(moved[0])} and {len(moved) - 1} more statistics moved in a forward pass")
    pairs = [(features, expected_features), (states, expected)]
    differences = [relative(found, wanted) for found, wanted in pairs if found is not None and wanted is not None]
    return within(max(differences), bounds.states)


def check_initial_weights(model: VisionLanguageModel, config: ModelConfig, init_from: str) -> Finding:
    """Compare projector, encoder and adapter with the export's files; the language model's own weights are too many."""
    manifest = read_start(Path(init_from))
    small = tuple(part for part in manifest.included if part != "llm")
    try:
        tensors = open_parts(Path(init_from), replace(manifest, included=small), config)
    except CheckpointError as error:
        return holds(str(error))
    parts = [part_weights(model, part) for part in ("projector", "vision", "llm.lora", "value_head")]
    # without an adapter that was merged, and what is spread over processes in pieces
    own = {
        name: tensor
        for part in parts
        for name, tensor in part.items()
        if name in tensors and full_shape(tensor) == tensor.shape and not hasattr(tensor, "placements")
    }
    if not any(isinstance(tensor, nn.Parameter) for tensor in own.values()):
        return not_made("this process holds nothing whole that the export has")
    worst, where = 0.0, f"{len(own)} of {len(tensors)} tensors are whole in this process"
    for name, tensor in own.items():
        difference = relative(tensor.detach().cpu(), tensors[name].to(tensor.dtype))
        if difference > worst:
            worst, where = difference, name
    return at_most(worst, 0.0, where)


def _training_mode(model: nn.Module, trained: Collection[str]) -> None:
    """Of what is frozen: the dropout and the batch norms of what trains may do as they like."""
    model.train()
    for name, module in model.named_modules():
        if is_adapter(name) or (name in ("vision", "projector") and name in trained):
            module.eval()
