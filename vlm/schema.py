"""The base of every config section: typed, frozen, unknown keys forbidden. Imports neither torch nor transformers."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One block of the YAML. Each room declares its own in its `config.py`; `vlm.config.RunConfig` joins them."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)
