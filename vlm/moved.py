"""Modules for loading, exporting, generating and chatting under the names that they had in earlier versions.

What was written against those goes on working, with a DeprecationWarning that says the new one. Nothing here uses them.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_SAME_NAME = (  # old package, new package, modules
    ("vlm.models", "vlm.generation", "generate sampling slot_cache"),
    ("vlm.export", "vlm.generation", "streaming"),
    ("vlm.export", "vlm.artifacts", "adapter assemble card evidence fingerprint folder manifest older parts pins"),
    ("vlm.export", "vlm.inference", "load messages placement quantize"),
    ("vlm.chat", "vlm.apps", "session record saving address"),
)
MOVED = {f"{old}.{name}": f"{new}.{name}" for old, new, names in _SAME_NAME for name in names.split()} | {
    "vlm.models.batched_generate": "vlm.generation.batched",
    "vlm.export.tokenizer": "vlm.artifacts.tokenizer",
    "vlm.export.load_base": "vlm.artifacts.base_models",
    "vlm.export.weights": "vlm.export.run",
    "vlm.chat": "vlm.apps",
}


class _OldNames(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        """An empty module, until `exec_module` puts the one in its place that is meant."""

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        warnings.warn(f"{old} is {MOVED[old]} now", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(MOVED[old])


def install() -> None:
    """Called once, when `vlm` is imported."""
    sys.meta_path.insert(0, _OldNames())  # before what finds files: a package under its old name has the new folder
