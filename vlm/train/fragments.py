"""Tensors of a checkpoint as the parts that each rank holds, under canonical names.

Each rank writes one safetensors file per folder. A tensor that a rank holds whole is stored under its name; a part of
one, as ZeRO and fully_shard hold it, as a flat piece under `<name>@<first element>`, with the shape of the whole in the
file's metadata. So a checkpoint does not depend on the engine, the ZeRO stage or the number of ranks that wrote it,
and whoever reads takes the elements it needs, from whichever files have them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm.compat import follow_umask
from vlm.errors import CheckpointError


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + len(values)) of a flattened tensor."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int
    values: Tensor  # [numel of this part]
    is_copy: bool = False  # read here too, written by another rank

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> Fragment:
        """All of a tensor [...], as a view."""
        return cls(name, tuple(tensor.shape), 0, tensor.detach().view(-1))  # a copy would not take what is loaded


@dataclass(frozen=True)
class _Piece:
    file: Path
    key: str
    start: int
    stop: int


@dataclass(frozen=True)
class HostCopy:
    """One rank's parts, copied to host memory: what happens to them afterwards does not reach the copy."""

    tensors: dict[str, Tensor]  # as they are stored: [...], or [numel] of a part
    shapes: dict[str, tuple[int, ...]]  # of the whole, of each tensor of which there is a part

    def write(self, folder: Path, rank: int) -> None:
        """As `folder/rank-00000.safetensors`. Raises OSError when the disk refuses."""
        save_tensors(self.tensors, folder / f"rank-{rank:05d}.safetensors", {"shapes": json.dumps(self.shapes)})


def copy_to_host(fragments: Iterable[Fragment]) -> HostCopy:
    """What this rank writes of the fragments. On a GPU it waits for them."""
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for part in fragments:
        if part.is_copy:
            continue
        values = part.values.detach().to("cpu", copy=True).contiguous()
        if part.start == 0 and values.numel() == math.prod(part.shape):
            tensors[part.name] = values.reshape(part.shape)
        else:
            tensors[f"{part.name}@{part.start}"] = values
            shapes[part.name] = part.shape
    return HostCopy(tensors, shapes)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors [...] as safetensors.

    Raises OSError when the disk refuses, which safetensors reports by an error of its own.
    """
    path.parent.mkdir(exist_ok=True)
    try:
        save_file(tensors, path, metadata)
        follow_umask(path)
    except SafetensorError as error:
        raise OSError(str(error)) from None


class FragmentReader:
    """Reads tensors, or elements of them, from the files of all ranks."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        for file in files:
            self._index(file)

    def read(self, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened tensor: [numel].

        Raises:
            CheckpointError: no rank wrote some of them.
        """
        pieces = sorted(self._pieces.get(name, ()), key=lambda piece: piece.start)
        parts, position, stop = [], start, start + numel
        for piece in pieces:
            if piece.start <= position < piece.stop and position < stop:
                end = min(stop, piece.stop)
                parts.append(_elements(piece, position - piece.start, end - piece.start))
                position = end
        if position < stop:
            raise CheckpointError(
                f"elements {position} to {stop} of {name} are in none of {sorted({str(p.file) for p in pieces})}. "
                "Usually a rank's file is missing: a copy that was cut short, or machines that share no output_dir"
            )
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def whole(self, name: str) -> Tensor:
        """One tensor in its own shape, [...]. Raises CheckpointError: no rank wrote some of it."""
        shape = self.shapes[name]
        return self.read(name, 0, math.prod(shape)).reshape(shape)

    def _index(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as opened:
                shapes = json.loads((opened.metadata() or {}).get("shapes", "{}"))
                for key in opened.keys():  # noqa: SIM118 - not a dict
                    self._add(file, key, tuple(opened.get_slice(key).get_shape()), shapes)
        except SafetensorError as error:
            raise CheckpointError(
                f"{file} is no safetensors file ({error}), and nothing else is read. Restore it, or remove its "
                "checkpoint to go on from the one before"
            ) from None

    def _add(self, file: Path, key: str, held: tuple[int, ...], shapes: dict[str, list[int]]) -> None:
        name, _, start = key.rpartition("@")
        if not name:
            name, start = key, "0"
            self.shapes[name] = held
        else:
            self.shapes[name] = tuple(shapes[name])
        stop = int(start) + math.prod(held)
        self._pieces.setdefault(name, []).append(_Piece(file, key, int(start), stop))


def state_files(checkpoint: Path, part: str) -> list[Path]:
    """The files of all ranks that hold the "weights" or the "optimizer" of a checkpoint.

    Raises:
        CheckpointError: there are none.
    """
    files = sorted((checkpoint / part).glob("rank-*.safetensors"))
    if not files:  # format version 1: one rank, every tensor whole
        old = checkpoint / {"weights": "weights.safetensors", "optimizer": "engine/optimizer.safetensors"}[part]
        files = [old] if old.is_file() else []
    if not files:
        raise CheckpointError(f"{checkpoint}: no {part} in it. Usually it is no checkpoint of this program")
    return files


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Canonical name -> tensor [...] of all that trained."""
    reader = FragmentReader(state_files(checkpoint, "weights"))
    return {name: reader.whole(name) for name in reader.shapes}


def _elements(piece: _Piece, start: int, stop: int) -> Tensor:
    """Elements from `start` to before `stop` of what a file holds, flattened: [stop - start]."""
    with safe_open(piece.file, framework="pt") as opened:
        if "@" in piece.key:  # flat: only these elements are read
            return opened.get_slice(piece.key)[start:stop]
        return opened.get_tensor(piece.key).reshape(-1)[start:stop]
