"""vlm: assemble any vision encoder with any language model, train the result, talk to it.

>>> import vlm
>>> model = vlm.load("cache/runs/quickstart/finetune/export")  # doctest: +SKIP
>>> model.chat("What is this?", images=["cat.png"])  # doctest: +SKIP
'A cat.'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm import moved
from vlm.version import __version__

if TYPE_CHECKING:
    from vlm.inference.load import load

moved.install()
__all__ = ["__version__", "load"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name == "load":  # imported late: it pulls in torch and transformers
        from vlm.inference.load import load

        return load
    raise AttributeError(f"module 'vlm' has no attribute {name!r}")
