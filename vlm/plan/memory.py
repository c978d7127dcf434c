"""How much memory a device has."""

from __future__ import annotations

import os
import re

import torch

from vlm.errors import ConfigError

_UNITS = {"": 2**30, "GIB": 2**30, "G": 2**30, "GB": 10**9, "MIB": 2**20, "M": 2**20, "MB": 10**6, "TIB": 2**40}
_FIXED = 2**30  # bytes: a CUDA context, cuBLAS's workspace, the library's kernels
_SHARE = 0.04  # of the device: what the allocator cannot use, as freed pieces do not fit what is asked for


def parse_memory(text: str) -> int:
    """Bytes. A number without a unit counts GiB.

    >>> parse_memory("24GiB") == parse_memory("24") == 24 * 2**30, parse_memory("80 GB")
    (True, 80000000000)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or not float(match[1]):
        raise ConfigError(f"--memory {text}: expected a size such as 24GiB, 80GB or 24 (GiB)")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def device_memory(device: str, world_size: int) -> tuple[int, str]:
    """Bytes that each process has here, and what they are of.

    Args:
        device: engine.device; "cpu" asks for the host's memory even where a GPU is.
        world_size: processes that share the host's memory.
    """
    if device != "cpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return properties.total_memory, properties.name
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total // world_size, "this machine's memory" + (f", shared by {world_size}" if world_size > 1 else "")


def usable(memory: int) -> int:
    """What a run may plan with: all but a fixed part and a share for what the estimate does not see."""
    return int(memory - _FIXED - _SHARE * memory)
