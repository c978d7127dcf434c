"""Where the blocks of a vision encoder are and which of its linear layers can carry adapters, found by looking."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlm.models.decoders import is_linear
from vlm.models.recompute import find_units


def networks_of_encoder(encoder: Any) -> dict[str, nn.Module]:
    """Name in the encoder -> network: one, or of a fused encoder one for each that it is made of."""
    if len(encoder.members) == 1:
        return {"trunk": encoder.trunk}
    return {f"trunk.towers.{number}": each.trunk for number, each in enumerate(encoder.members)}


def blocks_of_encoder(encoder: Any) -> list[dict[str, nn.Module]]:
    """Of each of its networks: name in the encoder -> block, from the pixels on."""
    return [
        {f"{place}.{name}": block for name, block in find_units(network).items()}
        for place, network in networks_of_encoder(encoder).items()
    ]


def linears_of_encoder(encoder: Any) -> dict[str, nn.Module]:
    """Name in the encoder -> linear layer of its blocks. Of torch's own attention none: it reads weights uncalled."""
    return {
        f"{name}.{inner}": module
        for blocks in blocks_of_encoder(encoder)
        for name, block in blocks.items()
        for inner, module in block.named_modules()
        if is_linear(module) and not _is_within_attention(block, inner)
    }


def _is_within_attention(block: nn.Module, name: str) -> bool:
    return bool(name) and isinstance(block.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
