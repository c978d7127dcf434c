"""Weights in files of torch.save (.bin, .pt, .pth), read with `weights_only=True`: tensors come out, no code runs."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from vlm.errors import CheckpointError
from vlm.models.weight_files import LazyTensors

PICKLED = (".pth", ".pt", ".bin")
_AROUND = ("model", "state_dict", "module")  # keys that programs put around the tensors
_INDEX = "pytorch_model.bin.index.json"


def read_pth(file: Path, where: str = "", device: str = "cpu") -> dict[str, Tensor]:
    """Name -> tensor [...] of a file; on the CPU they lie in the mapped file until they are used.

    Tensors of dicts inside dicts have joined names. Whatever else the file holds is left out.

    Args:
        where: stands before the file's name in messages: the key of a config, or an option.
        device: "meta" gives shapes alone.

    Raises:
        CheckpointError: not there, damaged, holds more than plain values, or no tensors at all.
    """
    where = f"{where}: {file}" if where else str(file)
    if not file.is_file():
        raise CheckpointError(f"{where} does not exist. Usually the path is misspelt or was not downloaded")
    try:  # files of torch before 1.6 are no zip archives, and cannot be mapped
        found: Any = torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{where} cannot be read as plain tensors ({' '.join(str(error).split())[:200]}). Usually the copy is "
            "damaged or incomplete, or it was saved with a whole Python object in it, which can run code and is never "
            "loaded here: save its state_dict"
        ) from None
    while isinstance(found, dict) and (inner := next((k for k in _AROUND if isinstance(found.get(k), dict)), None)):
        found = found[inner]
    tensors = _flat(found) if isinstance(found, dict) else {}
    if not tensors:
        raise CheckpointError(f"{where} holds no tensors by name. Usually it is not a checkpoint of a model")
    return tensors


def _flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """Tensors [...] of a dict and of dicts inside it, by joined names."""
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            found[f"{prefix}{name}"] = value
    return found


class PthFolder(LazyTensors):
    """The tensors [...] of a folder's .bin files, or of its .pth files where it has none. One file at a time is open.

    Raises:
        CheckpointError: there are none, a file that the index names is missing, or as `read_pth`.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__({}, self._read_one)
        self._files: dict[str, Path] = {}
        self._open: tuple[Path | None, dict[str, Tensor]] = None, {}
        for file in _find(folder):
            for name, tensor in read_pth(file, device="meta").items():
                self._files[name] = file
                self.shapes[name] = tuple(tensor.shape)

    def _read_one(self, name: str) -> Tensor:
        """[...]"""
        file = self._files[name]
        if self._open[0] != file:
            self._open = None, {}  # lets go before the next is read
            self._open = file, read_pth(file)
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
