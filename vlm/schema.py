"""The base of every config section: typed, frozen, unknown keys forbidden. Imports neither torch nor transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


def _at_home(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~") else path


PathText = Annotated[str, AfterValidator(_at_home)]
"""A file, folder, or name that a library resolves. `~` is the home directory, as in a shell."""


class Section(BaseModel):
    """One block of the YAML. Each room declares its own in its `config.py`; `vlm.config.RunConfig` joins them."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)
