"""Where words enter the decoder: what it does to embeddings that it looks up itself, and not to those it is given.

Falcon-H1 multiplies only what it looks up, so embeddings handed to it must be multiplied before. Found by comparing
what its first block reads in both cases; no block runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.models.decoders import find_blocks, find_decoder

_CLOSE = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative; 16-bit formats round each step
_NAMES = ("embedding_multiplier", "scale_emb", "embed_scale", "embedding_scale")  # of settings, in configs


@torch.no_grad()
def find_embedding_factor(llm: Any) -> float:
    """What embeddings must be multiplied by before they are given to the decoder; 1 for most.

    Of a model without weights here (on meta, or on another stage) 1.

    Raises:
        ConfigError: no factor makes what its first block reads the same, so that training would read other words than
            the model knows.
    """
    embedding = llm.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    if weight is None or weight.is_meta:
        return 1.0
    ids = torch.arange(1, 5, device=weight.device)[None] % len(weight)
    looked_up = _first_block_reads(llm, input_ids=ids)
    words = embedding(ids)
    if looked_up is None or _reads(llm, words, looked_up):
        return 1.0
    for factor in _candidates(llm, words, looked_up):
        if _reads(llm, words * factor, looked_up):
            return factor
    raise ConfigError(
        f"model.llm.path {llm.config.name_or_path}: model type {llm.config.model_type} does something to embeddings "
        "that it looks up itself, and not to those that it is given, which is no factor. So images cannot be put among "
        "its words. docs/models.md lists the types that can"
    )


@torch.no_grad()
def embedding_scale(llm: Any) -> float:
    """What the rows of the token embedding are multiplied by before the decoder reads them: Gemma's by the root of the
    width. Found by looking up some tokens. 1 for most models, and for one without weights.
    """
    embedding = llm.get_input_embeddings()
    if embedding.weight.is_meta:
        return 1.0
    ids = torch.arange(min(256, len(embedding.weight)), device=embedding.weight.device)
    rows, read = embedding.weight[ids], embedding(ids)
    scale = 1.0 if torch.equal(rows, read) else float(read.float().std() / rows.float().std().clamp_min(1e-12))
    return scale * find_embedding_factor(llm)


def embedding_std(llm: Any) -> float:
    """Standard deviation of the token embeddings as the decoder reads them, which is the size of a word. 1 on meta."""
    weight = llm.get_input_embeddings().weight
    return 1.0 if weight.is_meta else embedding_scale(llm) * weight.float().std().item()


def _candidates(llm: Any, words: Tensor, looked_up: Tensor) -> Iterator[float]:
    """words, looked_up: [1, l, D]. The config's own number first: it is exact where a measured one is rounded."""
    config = llm.config.get_text_config(decoder=True)
    yield from (float(value) for name in _NAMES if (value := getattr(config, name, None)))
    yield math.sqrt(words.shape[-1])
    if words.shape == looked_up.shape:
        yield float((words.double() * looked_up).sum() / words.double().square().sum().clamp_min(1e-30))


def _reads(llm: Any, words: Tensor, expected: Tensor) -> bool:
    """Whether the first block reads `expected`, float32 [1, l, D], when it is given `words` [1, l, D]."""
    found = _first_block_reads(llm, inputs_embeds=words)
    close = _CLOSE.get(words.dtype, 0.02)
    return (
        found is not None
        and found.shape == expected.shape
        and float((found - expected).norm()) <= close * float(expected.norm())
    )


class _Reached(Exception):
    def __init__(self, hidden_states: Tensor) -> None:
        """hidden_states: float32 [1, l, D], entering the first block."""
        super().__init__()
        self.hidden_states = hidden_states


def _first_block_reads(llm: Any, **words: Tensor) -> Tensor | None:
    """`input_ids` int64 [1, l] or `inputs_embeds` [1, l, D] -> float32 [1, l, D].

    None if the first block is not found, not reached, or gets no tensor.
    """

    def stop(_module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        read = positional[0] if positional else named.get("hidden_states")
        if isinstance(read, Tensor):
            raise _Reached(read.float())

    try:
        block = next(iter(find_blocks(llm).values()))
    except ValueError:  # no list of blocks
        return None
    hook = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        find_decoder(llm)(use_cache=False, **words)
    except _Reached as reached:
        return reached.hidden_states
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError):
        return None  # classes differ in what they need beside words
    finally:
        hook.remove()
    return None
