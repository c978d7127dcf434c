"""Which engine a launch of so many processes gets."""

from __future__ import annotations

from vlm.errors import ConfigError
from vlm.train.config import EngineConfig


def kind_of_launch(config: EngineConfig, num_processes: int) -> str:
    """`engine.kind`, or what `auto` stands for: local, ddp, zero, fsdp, pipeline.

    Raises:
        ConfigError: the engine does not fit the number of processes.
    """
    if config.kind == "auto":
        return "local" if num_processes == 1 else "ddp"
    if config.kind == "local" and num_processes > 1:
        raise ConfigError(
            f"engine.kind is local, which is one process, but there are {num_processes}. Set engine.kind to auto, ddp, "
            "zero, fsdp or pipeline, or start one process (`vlm plan`: --gpus 1)"
        ).on_every_rank()
    if config.kind == "pipeline" and num_processes % config.num_stages:
        raise ConfigError(
            f"engine.num_stages {config.num_stages} does not divide {num_processes} processes. Start a multiple of it: "
            f"torchrun --nproc_per_node={config.num_stages} train_pipeline.py ... (`vlm plan`: "
            f"--gpus {config.num_stages})"
        ).on_every_rank()
    return config.kind
