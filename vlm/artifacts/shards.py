"""Weights of a model folder, written while they are read: no more than one file's worth is in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from vlm.models.weight_files import INDEX, SINGLE


def stream_shards(tensors: Mapping[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    """Write tensors [...] as model.safetensors, or numbered files and their index as transformers reads them.

    Args:
        tensors: each is asked for once, in order.
        max_shard_bytes: a file is closed before it would hold more; a larger tensor has a file of its own.
    """
    parts: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = 0

    def close() -> None:
        # contiguous and sharing memory with no other, as safetensors demands
        save_file(held, folder / f"part-{len(parts)}.safetensors", metadata={"format": "pt"})
        parts.append(list(held))
        held.clear()

    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if held and sum(each.numel() * each.element_size() for each in held.values()) + size > max_shard_bytes:
            close()
        held[name] = tensor.contiguous().clone()
        total += size
    close()
    if len(parts) == 1:
        (folder / "part-0.safetensors").rename(folder / SINGLE)
        return
    names = [f"model-{n:05}-of-{len(parts):05}.safetensors" for n in range(1, len(parts) + 1)]
    for number, name in enumerate(names):
        (folder / f"part-{number}.safetensors").rename(folder / name)
    places = {name: file for file, members in zip(names, parts, strict=True) for name in members}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
