"""How many tokens of keys and values fit in the memory beside a model."""

from __future__ import annotations

import psutil
import torch

from vlm.errors import ConfigError
from vlm.generation.slot_cache import CELLS, bytes_per_token, round_up
from vlm.inference.load import LoadedModel

_MEMORY_SHARE = 0.25  # of what is free, for keys and values; growing copies them, so for a moment it is twice as much


def fitting_tokens(loaded: LoadedModel, max_running: int) -> int:
    """Tokens whose keys and values take a quarter of the free memory, and no more than all replies could use.

    Raises:
        ConfigError: not even a short conversation would fit.
    """
    each = bytes_per_token(loaded.model)
    fitting = int(free_memory(loaded) * _MEMORY_SHARE) // each
    if fitting < CELLS:
        raise ConfigError(f"a token takes {each:,} bytes of cache and there is no memory for {CELLS}; free some")
    return min(fitting, max_running * round_up(loaded.max_tokens))


def free_memory(loaded: LoadedModel) -> int:
    """Bytes, of the GPU that the model is on, else of the host."""
    if loaded.device.type == "cuda":
        return int(torch.cuda.mem_get_info(loaded.device)[0])
    return int(psutil.virtual_memory().available)
