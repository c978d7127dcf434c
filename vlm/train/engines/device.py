"""engine.device -> the device of this process."""

from __future__ import annotations

import torch

from vlm.errors import ConfigError
from vlm.launch import local_rank


def choose_device(name: str) -> torch.device:
    """auto: this process's GPU if there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "engine.device is cuda, but torch sees no GPU here. Set engine.device to auto or cpu, "
            "or install a CUDA build of torch; `vlm doctor` shows what is installed"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank()} of this machine has no GPU of its own: there are {torch.cuda.device_count()}. "
            "Start as many processes as GPUs, or set engine.device to cpu"
        )
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())
