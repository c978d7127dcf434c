"""Weights in files of torch.save (.bin, .pth): tensors only, nothing else in the file is run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from vlm.errors import CheckpointError
from vlm.models.weight_files import LazyTensors

_INDEX = "pytorch_model.bin.index.json"
_WRAPPERS = ("state_dict", "model", "module")  # some programs write {"model": tensors}


class PickledWeights(LazyTensors):
    """The tensors [...] of a folder's .bin files, or of its .pth files where it has none.

    One file at a time is open; of the newer format (a zip archive) a tensor's bytes are read when it is asked for.

    Raises:
        CheckpointError: there are none, a file that the index names is missing, or it holds more than tensors.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__({}, self._read_one)
        self._files: dict[str, Path] = {}
        self._open: tuple[Path | None, dict[str, Tensor]] = None, {}
        for file in _find(folder):
            for name, tensor in _load(file, device="meta").items():
                self._files[name] = file
                self.shapes[name] = tuple(tensor.shape)

    def _read_one(self, name: str) -> Tensor:
        """[...]"""
        file = self._files[name]
        if self._open[0] != file:
            self._open = None, {}  # lets go before the next is read
            self._open = file, _load(file, device="cpu")
        return self._open[1][name]


def _find(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise CheckpointError(f"{index} names {missing}, which are not there. Usually the download is incomplete")
        return [folder / name for name in names]
    files = sorted(folder.glob("pytorch_model*.bin")) or sorted(folder.glob("*.pth"))
    if not files:
        raise CheckpointError(
            f"{folder} holds no weights: no .safetensors, no pytorch_model*.bin and no .pth. Usually the download is "
            "incomplete"
        )
    return files


def _load(file: Path, device: str) -> dict[str, Tensor]:
    """Name -> tensor [...]; on "meta" the shapes alone."""
    try:
        try:
            values = torch.load(file, map_location=device, mmap=True, weights_only=True)
        except RuntimeError:  # of the format before torch 1.6, which is read as a whole
            values = torch.load(file, map_location=device, weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read as tensors alone ({' '.join(str(error).split())[:200]}). A file that holds code is "
            "not opened. Usually the download is incomplete, or the file is of another program"
        ) from None
    return _tensors(values, file)


def _tensors(values: Any, file: Path) -> dict[str, Tensor]:
    """[...] each."""
    wrapped = [values[key] for key in _WRAPPERS if isinstance(values, Mapping) and isinstance(values.get(key), Mapping)]
    found = wrapped[0] if wrapped else values
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise CheckpointError(f"{file} holds something else than named tensors, so it is not a model's weights")
    return dict(found)
