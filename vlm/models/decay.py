"""Which trained weights are decayed: matrices. Not vectors, biases, norms, tokens, and tables of positions or biases.

Found by looking at where a tensor hangs in the model. What timm and open_clip list in `no_weight_decay()` counts too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase

from torch import nn

from vlm.models.partition import full_shape
from vlm.models.trainable import part_of

_STATES = {"A_log"}  # transformers marks it, but the mark is lost when weights are loaded
_OF_POSITIONS = re.compile(r"(^|_)(wpe|pos|position|positional|positions|relative|rel)(_|$)")


def undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay must leave alone."""
    names = set(_named_by_libraries(model))
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if not _is_matrix(name, module, full_shape(parameter)):
                names.add(name)
    return names


def _is_matrix(name: str, module: nn.Module, shape: tuple[int, ...]) -> bool:
    owner, _, leaf = name.rpartition(".")
    if len(shape) < 2 or leaf.endswith("bias") or "Norm" in type(module).__name__:  # Cohere's norms have a row a head
        return False
    if isinstance(module, nn.Embedding):
        return _OF_POSITIONS.search(owner.rpartition(".")[2].lower()) is None
    if leaf.endswith("weight"):
        return True
    # what is no module's weight: in an encoder or projector a token or a table, in a decoder a vector of many axes, or
    # experts
    return part_of(name) not in ("vision", "projector") and leaf not in _STATES and sum(size > 1 for size in shape) > 1


def _named_by_libraries(model: nn.Module) -> Iterator[str]:
    """Their names may have wildcards, and begin at the module that lists them."""
    for prefix, module in model.named_modules():
        listed = getattr(module, "no_weight_decay", None)
        patterns = listed() if callable(listed) else ()
        if patterns:
            for name, _ in module.named_parameters():
                if any(fnmatchcase(name, pattern) for pattern in patterns):
                    yield f"{prefix}.{name}" if prefix else name
