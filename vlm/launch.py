"""What the launcher says of this process. Environment variables of launchers are read here and nowhere else.

torchrun, `deepspeed` and `accelerate launch` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Without
them this is a launch of one process. Imports no torch, so that a log line or an error message can ask.
"""

from __future__ import annotations

import os


def launched_rank() -> int:
    return int(os.environ.get("RANK") or 0)


def launched_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def local_rank() -> int:
    """Number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def local_size() -> int | None:
    """Number of processes on this machine; None where the launcher does not say."""
    size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # torchrun's, DeepSpeed's
    return int(size) if size else None


def is_on_one_machine() -> bool:
    """Whether the launcher says that all processes run here."""
    return local_size() == launched_size()


def is_of_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_restarted() -> bool:
    """Whether torchrun has started these processes again, after some of them were lost."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def set_local_rank() -> None:
    """DeepSpeed fails without LOCAL_RANK, even in one process."""
    os.environ.setdefault("LOCAL_RANK", "0")
