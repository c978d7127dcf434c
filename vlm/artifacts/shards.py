"""Weights as model.safetensors, or as numbered files and their index, written with no more than one file in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlm.compat import follow_umask
from vlm.errors import ConfigError
from vlm.models.weight_files import INDEX


def write_shards(sizes: Mapping[str, int], read: Callable[[str], Tensor], folder: Path, max_shard_size: str) -> None:
    """Write tensors [...] as transformers reads them, one file after the other.

    Args:
        sizes: name -> bytes, in the order to write.
        read: gives a tensor when it is asked for; it is let go once its file is written.
    """
    from huggingface_hub.serialization._base import split_state_dict_into_shards_factory

    folder.mkdir(parents=True, exist_ok=True)
    split = split_state_dict_into_shards_factory(
        dict(sizes), get_storage_size=lambda size: size, max_shard_size=max_shard_size,
        filename_pattern="model{suffix}.safetensors",
    )  # fmt: skip
    for name, members in split.filename_to_tensors.items():
        save_plain(((member, read(member)) for member in members), folder / name)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def save_plain(tensors: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Names and tensors of any shape [...] and device; on a disk that refuses, safetensors' own error."""
    # contiguous, on the CPU and sharing memory with no other, as safetensors demands
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors}
    save_file(plain, path, metadata={"format": "pt"})
    follow_umask(path)


def check_shard_size(text: str) -> None:
    """Raises ConfigError unless it is written like 5GB or 200MB."""
    from huggingface_hub.serialization._base import parse_size_to_int

    try:
        size = parse_size_to_int(text)
    except (ValueError, KeyError, TypeError):
        size = 0
    if size < 1:
        raise ConfigError(f"--max-shard-size {text!r}: expected a size such as 5GB or 200MB")


def num_bytes(shape: Iterable[int], dtype: torch.dtype) -> int:
    """
    >>> num_bytes((3, 5), torch.bfloat16)
    30
    """
    return math.prod(shape) * dtype.itemsize
