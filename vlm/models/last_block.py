"""The last block without the tokens whose output nothing reads.

Only what predicts a supervised token is read after the last block. The other tokens give it keys and values and go no
further: neither its feed-forward nor the final norm computes them, forward or backward. It is a block's own code that
runs; hooks take tokens out of what enters it and of what its attention gives, which alone still has all. For blocks as
Llama's: `input_layernorm`, `self_attn`, the sum with what entered, and the feed-forward.

Letters: T tokens end to end, n of them that are read, D width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from vlm.models.families import family_of

_READ, _WHOLE = "read", "whole"  # attributes of a layout: int64 [n], and [1, T, D]
_IS_CUT = "is_cut"  # attribute of a block that has the hooks


def mark_read(layout: Tensor, index: Tensor) -> None:
    """Say on the layout [1, 1, S, 3], which every block is given, which tokens are read, int64 [n]."""
    setattr(layout, _READ, index)


def can_cut(llm: Any) -> bool:
    """Whether its blocks are known to be as this module needs them."""
    parts = family_of(llm.config).parts
    return parts is not None and parts.leaves_out


def cut_last_block(llm: Any) -> None:
    """Let the last block leave out what is not read, whenever a layout says so. Cheap to repeat."""
    parts = family_of(llm.config).parts
    assert parts is not None
    block = llm.get_submodule(parts.blocks)[-1]
    if not hasattr(block, _IS_CUT):
        setattr(block, _IS_CUT, True)
        block.register_forward_pre_hook(_enter, with_kwargs=True)
        block.self_attn.register_forward_pre_hook(partial(_attend_to_all, block.input_layernorm), with_kwargs=True)
        block.self_attn.register_forward_hook(_take_out, with_kwargs=True)


def _enter(_block: nn.Module, inputs: tuple[Any, ...], given: dict[str, Any]) -> Any:
    """[1, T, D] -> [1, n, D], which the block adds its results to. The whole goes along on the layout: with gradient
    checkpointing the block's own hooks do not run again, those inside do."""
    layout = given.get("attention_mask")
    index = getattr(layout, _READ, None)
    if layout is None or index is None:
        return None
    own = layout.clone()
    setattr(own, _READ, index)
    setattr(own, _WHOLE, inputs[0])
    return (inputs[0][:, index], *inputs[1:]), {**given, "attention_mask": own}


def _attend_to_all(
    norm: nn.Module, _attention: nn.Module, inputs: tuple[Any, ...], given: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Attention reads all tokens, [1, T, D], normalized."""
    whole = getattr(given.get("attention_mask"), _WHOLE, None)
    return None if whole is None else (inputs, {**given, "hidden_states": norm(whole)})


def _take_out(_attention: nn.Module, _inputs: tuple[Any, ...], given: dict[str, Any], output: Any) -> Any:
    """Of what attention gives, [1, T, D], what is read, [1, n, D]."""
    layout = given.get("attention_mask")
    return (output[0][:, getattr(layout, _READ)], *output[1:]) if hasattr(layout, _WHOLE) else None
