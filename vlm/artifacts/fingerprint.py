"""Which weights a trained part was trained beside: hashes of a few tensors of the base model.

Hashing all of a 7B model takes a minute; the first and last row of eight tensors, drawn by the hash of their names,
tell any two trainings apart and take milliseconds. Values are rounded to bfloat16 first, so the same weights stored in
another float type count as the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from vlm.errors import CheckpointError

Rows = Callable[[str], Tensor]  # tensor name -> its first and last row
NUM_TENSORS = 8


def fingerprint(names: Collection[str], rows: Rows) -> dict[str, str]:
    """Tensor name -> hash, for eight of `names`."""
    drawn = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:NUM_TENSORS]
    return {name: _hash(rows(name)) for name in sorted(drawn)}


def fingerprint_files(path: str) -> dict[str, str]:
    """Of the safetensors of a model folder, or of a model that transformers has downloaded. {} when there are none."""
    with ExitStack() as stack:
        owner = {}
        for file in weight_files(path):
            opened = stack.enter_context(safe_open(file, framework="pt"))
            owner.update(dict.fromkeys(opened.keys(), opened))
        # a tied head is in some files and not in others, a vocabulary may be padded, and norms are often all ones
        names = [name for name in owner if not re.search(r"lm_head|embed|norm|bias", name)]
        return fingerprint(names, lambda name: _ends(owner[name].get_slice(name)))


def differences(expected: dict[str, str], tensors: dict[str, Tensor]) -> list[str]:
    """A line for every tensor [...] that is not what it was; tensors whose names are not known here say nothing."""
    found = {name: _hash(_ends(tensors[name])) for name in expected if name in tensors}
    return [f"  {name}: {expected[name]} -> {value}" for name, value in found.items() if value != expected[name]]


def refuse_other_base(expected: dict[str, str], found: dict[str, str], what: str, export: Path) -> None:
    """
    Args:
        what: names the base model in the message, e.g. "model.llm.path models/smollm2".

    Raises:
        CheckpointError: the base model's weights are not those that the export was trained beside.
    """
    names = sorted(expected.keys() | found.keys()) if expected and found else []
    lines = [f"  {n}: {expected.get(n, 'absent')} -> {found.get(n, 'absent')}" for n in names]
    lines = [line for line, n in zip(lines, names, strict=True) if expected.get(n) != found.get(n)]
    if lines:
        raise CheckpointError(
            f"{export}: {what} holds other weights than those this export was trained beside (hash then -> now):\n"
            + "\n".join(lines)
            + "\nUsually another model stands at this path now. Put the right one there, or use a complete export "
            "(vlm export RUN --full), which needs no base models"
        )


def weight_files(path: str) -> list[Path]:
    """The safetensors of a model folder, in order; [] when nothing is on this disk."""
    folder = Path(path)
    if folder.is_dir():
        return sorted(folder.glob("*.safetensors"))
    if folder.is_file():
        return [folder] if folder.suffix == ".safetensors" else []
    from transformers.utils import cached_file

    for name in ("model.safetensors", "model.safetensors.index.json"):
        try:
            found = cached_file(path, name, local_files_only=True)
        except OSError:  # not downloaded, or a name of another library
            continue
        if found is not None:
            return sorted(Path(found).parent.glob("*.safetensors"))
    return []


def _ends(tensor: Tensor) -> Tensor:
    """[R, ...], or a slice of a file -> its first and last row, [2 * numel of a row]; a scalar -> [1]."""
    shape = tuple(tensor.get_shape()) if hasattr(tensor, "get_shape") else tuple(tensor.shape)
    if not shape:
        return tensor[...].reshape(1)
    last = shape[0] - 1
    return torch.cat([tensor[0:1].flatten(), tensor[last:].flatten()])


def _hash(rows: Tensor) -> str:
    """Hash of values of any shape [...], rounded to bfloat16."""
    values = rows.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]
