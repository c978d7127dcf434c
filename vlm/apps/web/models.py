"""The models that a page offers: exports found on disk, loaded when one is first asked."""

from __future__ import annotations

import gc
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vlm.artifacts.manifest import NAME
from vlm.data.image_order import ImageOrder
from vlm.inference.load import LoadedModel, load
from vlm.logs import log

OnProgress = Callable[[float], None]
Load = Callable[..., LoadedModel]  # path, on_progress, and an adapter if there is one


@dataclass(frozen=True)
class Export:
    """One choice. The browser knows its number and label, never the path."""

    label: str
    path: Path
    adapter: Path | None = None  # a LoRA that is added to it


def find_exports(first: Path | None, runs: Path | None, adapter: Path | None = None) -> list[Export]:
    """`first`, the same with `adapter` if there is one, then all export folders below `runs` by name.

    A label is the path below `runs`, without a last `/export`.
    """
    below = sorted(path.parent for path in runs.rglob(NAME)) if runs is not None and runs.is_dir() else []
    below = [path for path in below if not any(part.startswith(".") for part in path.parts if part not in (".", ".."))]
    exports = []
    if first is not None:
        same = [path for path in below if path.resolve() == first.resolve()]
        exports.append(Export(_label(first, runs if same else None), first))
        if adapter is not None:
            exports.append(Export(f"{exports[0].label} + {_label(adapter, None)}", first, adapter))
        below = [path for path in below if path not in same]
    return exports + [Export(_label(path, runs), path) for path in below]


class ModelStore:
    """Loads exports by number and keeps the last ones asked. All sessions of a page share one.

    Args:
        exports: the choices.
        load_export: for tests; by default `vlm.load` on `device` with `image_order` and `template`.
        max_loaded: models held in memory at once; the one asked longest ago goes first.
    """

    def __init__(
        self,
        exports: Sequence[Export],
        device: str = "auto",
        max_loaded: int = 1,
        load_export: Load | None = None,
        image_order: ImageOrder | None = None,
        template: str | None = None,
    ) -> None:
        self.exports = list(exports)
        self.max_loaded = max_loaded
        self._load = load_export or partial(_load_and_tell, device=device, image_order=image_order, template=template)
        self._loaded: OrderedDict[int, LoadedModel] = OrderedDict()
        self._turn = threading.Lock()

    @property
    def labels(self) -> list[str]:
        return [export.label for export in self.exports]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Held while a model is loaded and asked: one answer at a time."""
        with self._turn:
            yield

    @property
    def is_busy(self) -> bool:
        """Somebody has the turn."""
        return self._turn.locked()

    def is_loaded(self, number: int) -> bool:
        return number in self._loaded

    def get(self, number: int, on_progress: OnProgress = lambda fraction: None) -> LoadedModel:
        """The model of a choice; to be called in one's `turn`.

        Args:
            on_progress: called with 0..1 while it loads; never when it is in memory.

        Raises:
            VLMError: see `vlm.load`.
        """
        if number in self._loaded:
            self._loaded.move_to_end(number)
            return self._loaded[number]
        while len(self._loaded) >= self.max_loaded:  # before loading, so that both need not fit
            self._loaded.popitem(last=False)
            gc.collect()
        export = self.exports[number]
        loaded = self._load(export.path, on_progress, **({} if export.adapter is None else {"adapter": export.adapter}))
        self._loaded[number] = loaded
        return loaded

    def unload(self) -> int:
        """Take all models out of memory; the next question loads its own again. To be called in one's `turn`.

        Returns:
            how many there were.
        """
        count = len(self._loaded)
        self._loaded.clear()
        gc.collect()
        torch = sys.modules.get("torch")  # without which none was loaded
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return count


def _load_and_tell(path: Path, on_progress: OnProgress, **options: Any) -> LoadedModel:
    loaded = load(path, on_progress=on_progress, **options)
    log(f"{path}: {loaded.describe_compute()}")
    return loaded


def _label(path: Path, runs: Path | None) -> str:
    """
    >>> _label(Path("cache/runs/quickstart/finetune/export"), Path("cache/runs"))
    'quickstart/finetune'
    >>> _label(Path("cache/runs/quickstart/finetune/export-full"), Path("cache/runs"))
    'quickstart/finetune/export-full'
    """
    parts = (path.relative_to(runs) if runs is not None and path.is_relative_to(runs) else path).parts
    parts = parts[:-1] if parts and parts[-1] == "export" else parts
    return "/".join(parts[-3:]) or path.resolve().name
