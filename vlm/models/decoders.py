"""Where the parts of a decoder are, found by looking at the model: its modules, not their names.

`vlm.models.families` knows what cannot be seen.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vlm.models.families import family_of
from vlm.models.partition import full_shape


def find_decoder(llm: Any) -> Any:
    """The module from embeddings to hidden states after the final norm, without the head.

    transformers' `get_decoder` is taken at its word unless it answers the whole model (Llama 4).
    """
    decoder = llm.get_decoder()
    if decoder is not llm:
        return decoder
    from transformers import PreTrainedModel

    inner = [module for module in llm.children() if isinstance(module, PreTrainedModel)]
    return inner[0] if inner else llm


def outside_decoder(llm: Any) -> set[str]:
    """Names of parameters that no loss here reaches: neither the decoder's nor the head's (an encoder of its own)."""
    modules = (find_decoder(llm), llm.get_input_embeddings(), llm.get_output_embeddings())
    used = {id(parameter) for module in modules if module is not None for parameter in module.parameters()}
    return {name for name, parameter in llm.named_parameters() if id(parameter) not in used}


def find_blocks(llm: Any) -> dict[str, nn.Module]:
    """Name inside `llm` -> block, in the order of the model.

    They lie in lists of modules, which lie in no other list. Of these the one nearest to the decoder counts, small
    ones (of norms, of mixing matrices) left out, and every other list with blocks of the same class (two stacks).

    Raises:
        ValueError: the decoder has no list of modules.
    """
    decoder = find_decoder(llm)
    lists = _outermost_lists(decoder)
    if not lists:
        raise ValueError(f"{type(decoder).__name__} has no list of blocks")
    sizes = {name: sum(math.prod(full_shape(each)) for each in _weights_of(blocks)) for name, blocks in lists.items()}
    large = [name for name in lists if sizes[name] >= max(sizes.values()) / 50]
    kind = type(lists[min(large, key=lambda name: (name.count("."), -sizes[name]))][0])
    outer = next((f"{name}." if name else "" for name, module in llm.named_modules() if module is decoder), "")
    return {
        f"{outer}{name}.{index}": block
        for name in lists
        if type(lists[name][0]) is kind
        for index, block in enumerate(lists[name])
    }


def _weights_of(blocks: nn.Module) -> Iterator[torch.Tensor]:
    """Packed ones too, which are buffers where `keep_packed_whole` has been."""
    yield from blocks.parameters()
    yield from (buffer for buffer in blocks.buffers() if buffer.dtype in (torch.uint8, torch.int8))


def _outermost_lists(decoder: nn.Module) -> dict[str, nn.ModuleList]:
    lists: dict[str, nn.ModuleList] = {}
    for name, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(name.startswith(f"{o}.") for o in lists):
            lists[name] = module
    return lists


def find_linears(llm: Any) -> dict[str, nn.Module]:
    """Name inside `llm` -> linear layer, of those in the decoder's blocks. transformers' Conv1D (GPT-2) is one too.

    The head is none of them, nor are layers beside which an adapter would do nothing: see `_NO_ADAPTER`.
    """
    without = _NO_ADAPTER | set(family_of(llm.config).uncalled)
    return {
        f"{name}.{inner}": module
        for name, block in find_blocks(llm).items()
        for inner, module in block.named_modules()
        if is_linear(module) and not without & set(inner.split("."))
    }


# dt_proj: the scan of a state-space block reads its weight without calling it. indexer: chooses which tokens attention
# sees, so no gradient reaches it; a classifier in a block chooses experts in the same way.
_NO_ADAPTER = {"dt_proj", "indexer", "classifier"}


def is_linear(module: nn.Module) -> bool:
    """A matrix product with a bias or without, whichever way its weight lies. Routers answer more than a product."""
    is_router = type(module).__name__.endswith("Router")
    return (isinstance(module, nn.Linear) and not is_router) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether its weight is [inputs, outputs], as transformers' Conv1D has it; nn.Linear has [outputs, inputs]."""
    return type(module).__name__ == "Conv1D"


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs).

    >>> linear_shape(nn.Linear(3, 5))
    (3, 5)
    """
    weight: Any = module.weight
    first, second = getattr(weight, "ds_shape", weight.shape)
    return (first, second) if is_transposed(module) else (second, first)


def accepts(module: nn.Module, name: str) -> bool:
    """Whether a module's forward takes an argument of this name, if only to leave it unread."""
    parameters = inspect.signature(module.forward).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
