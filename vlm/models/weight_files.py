"""Tensors that are read one at a time, for a process that needs only some of them, or has no room for all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlm.errors import CheckpointError

ROWS = 4096  # compared at a time
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Shapes = Mapping[str, tuple[int, ...]]


class LazyTensors(Mapping[str, Tensor]):
    """Name -> tensor [...] of any shape, read whenever it is asked for and not kept.

    Attributes:
        shapes: of all, in order; known without reading.
    """

    def __init__(self, shapes: Shapes, read: Callable[[str], Tensor]) -> None:
        self.shapes = dict(shapes)
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def only(self, names: Iterable[str]) -> LazyTensors:
        """Some of them."""
        return LazyTensors({name: self.shapes[name] for name in names}, self._read)


def joined(*groups: Mapping[str, Tensor]) -> LazyTensors:
    """The tensors [...] of several sources, whose names differ."""
    owner = {name: group for group in groups for name in group}
    shapes = {name: shape for group in groups for name, shape in shapes_of(group).items()}
    return LazyTensors(shapes, lambda name: owner[name][name])


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> LazyTensors:
    """The same tensors [...] by longer names."""
    shapes = {prefix + name: shape for name, shape in shapes_of(tensors).items()}
    return LazyTensors(shapes, lambda name: tensors[name.removeprefix(prefix)])


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Name -> shape of tensors [...]. Reads nothing that is not in memory."""
    if isinstance(tensors, LazyTensors):
        return tensors.shapes
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


class WeightFiles(LazyTensors):
    """The weights of a local folder, or of a name that transformers resolves, by transformers' names.

    Args:
        key: of the config, or what else names the folder in messages.

    Attributes:
        dtypes: name -> number format, as safetensors writes it: "BF16".

    Raises:
        CheckpointError: there are no safetensors.
    """

    def __init__(self, path: str, key: str = "model.llm.path") -> None:
        super().__init__({}, self.read)
        self.path = path
        self.key = key
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        for file in self._find():
            try:
                with safe_open(file, framework="pt") as opened:
                    names = list(opened.keys())
                    for name in names:
                        self._files[name] = file
                        part = opened.get_slice(name)
                        self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), part.get_dtype()
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} is damaged ({error}). Copy or download it again") from None

    def read(self, name: str) -> Tensor:
        """One tensor [...], in the dtype of the file; nothing else of the file is read."""
        with safe_open(self._files[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def are_equal(self, first: str, second: str) -> bool:
        """Compare two tensors, some rows at a time."""
        if self.shapes[first] != self.shapes[second]:
            return False
        with (
            safe_open(self._files[first], framework="pt") as file,
            safe_open(self._files[second], framework="pt") as other,
        ):
            one, two = file.get_slice(first), other.get_slice(second)
            starts = range(0, self.shapes[first][0], ROWS)
            return all(torch.equal(one[start : start + ROWS], two[start : start + ROWS]) for start in starts)

    def _find(self) -> list[Path]:
        index = self._resolve(INDEX)
        if index is not None:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [self._resolve(name) for name in names]
            missing = [name for name, file in zip(names, files, strict=True) if file is None]
            if missing:
                raise CheckpointError(f"{self.key} {self.path}: {index} names {missing}, which are not there")
            return [file for file in files if file is not None]
        single = self._resolve(SINGLE)
        if single is None:
            raise CheckpointError(
                f"{self.key} {self.path}: holds neither {SINGLE} nor {INDEX}. Usually the path is misspelt or the "
                "weights are pickled (.bin): convert them once with transformers' save_pretrained"
            )
        return [single]

    def _resolve(self, name: str) -> Path | None:
        if Path(self.path).is_dir():
            file = Path(self.path) / name
            return file if file.is_file() else None
        from transformers.utils import cached_file

        try:
            found = cached_file(self.path, name, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise CheckpointError(f"{self.key} {self.path}: cannot fetch {name} ({str(error)[:300]})") from None
        return None if found is None else Path(found)
