"""Weights in files of torch.save, read with `weights_only=True`: tensors come out, and no code of the file runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from vlm.errors import CheckpointError

PICKLED = (".pth", ".pt", ".bin")
_AROUND = ("model", "state_dict", "module")  # keys that programs put around the tensors


def open_pth(path: str, key: str) -> Mapping[str, Tensor]:
    """Name -> tensor [...] of a file; they lie in the mapped file until they are used.

    Args:
        key: of the config, for messages.

    Raises:
        CheckpointError: not there, damaged, holds more than tensors, or no tensors at all.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{key}: {path} does not exist. Usually the path is misspelt or was not downloaded")
    try:
        found: Any = _load(path)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{key}: {path} is not a file of tensors alone ({str(error)[:200]}). Usually the download is incomplete, "
            "or it was saved with a whole Python object in it, which is not read here: save its state_dict"
        ) from None
    while isinstance(found, dict) and (inner := next((k for k in _AROUND if isinstance(found.get(k), dict)), None)):
        found = found[inner]
    tensors = {name: each for name, each in found.items() if torch.is_tensor(each)} if isinstance(found, dict) else {}
    if not tensors:
        raise CheckpointError(f"{key}: {path} holds no tensors by name. Usually it is not a checkpoint of a model")
    return tensors


def _load(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # files of torch before 1.6 are no zip archives, and cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)
