"""A fault and how it is planted; those that there are stand in test_planted_faults.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from vlm.prepare import Prepared

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Fault:
    name: str
    found_by: str  # the check
    setup: str
    plant: Callable[[Patch, Prepared], Any]


FAULTS: list[Fault] = []


def fault(name: str, found_by: str, setup: str = "lora") -> Callable[[Any], Any]:
    def register(plant: Any) -> Any:
        FAULTS.append(Fault(name, found_by, setup, plant))
        return plant

    return register


def wrap(patch: Patch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace a function by `change(original, *its arguments)`."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *given, **named: change(original, *given, **named))
