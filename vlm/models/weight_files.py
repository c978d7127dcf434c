"""Single tensors out of a language model's safetensors, for a process that needs only some of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlm.errors import CheckpointError

ROWS = 4096  # compared at a time
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class WeightFiles:
    """The weights of a local folder, or of a name that transformers resolves, by transformers' names.

    Args:
        key: of the config, or what else names the folder in messages.

    Raises:
        CheckpointError: there are no safetensors.
    """

    def __init__(self, path: str, key: str = "model.llm.path") -> None:
        self.path = path
        self.key = key
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for file in self._find():
            try:
                with safe_open(file, framework="pt") as opened:
                    names = list(opened.keys())
                    for name in names:
                        self._files[name] = file
                        self.shapes[name] = tuple(opened.get_slice(name).get_shape())
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
