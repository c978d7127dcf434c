"""What the launcher says of this process. Environment variables of launchers are read here and nowhere else.

torchrun, `deepspeed` and `accelerate launch` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Without
them this is a launch of one process. Imports no torch, so that a log line or an error message can ask.
"""

from __future__ import annotations

import os

from vlm.errors import ConfigError


def launched_rank() -> int:
    return int(os.environ.get("RANK") or 0)


def asked_processes() -> int | None:
    """NPROC_PER_NODE, the number of processes to start on this machine as XTuner and ms-swift take it.

    None without it, and in a process that a launcher has started.

    Raises:
        ConfigError: it is not a number of processes.
    """
    text = os.environ.get("NPROC_PER_NODE", "").strip()
    if not text or "RANK" in os.environ:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"NPROC_PER_NODE={text}: expected a number of processes, at least 1")
    return int(text)


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


# settings of `accelerate launch`, by the variables that it makes of them: its flag, what means nothing, our key
_OF_ACCELERATE = {
    "ACCELERATE_MIXED_PRECISION": ("--mixed_precision", ("no",), "train.precision"),
    "ACCELERATE_USE_DEEPSPEED": ("--use_deepspeed", ("false",), "engine.kind: zero"),
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("--zero_stage", (), "engine.stage"),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("--deepspeed_config_file", ("none",), "engine.deepspeed"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("--offload_optimizer_device", ("none",), "engine.offload"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("--offload_param_device", ("none",), "engine.offload"),
    "ACCELERATE_USE_FSDP": ("--use_fsdp", ("false",), "engine.kind: fsdp"),
    "FSDP_OFFLOAD_PARAMS": ("--fsdp_offload_params", ("false",), "engine.offload, of zero"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("--fsdp_activation_checkpointing", ("false",), "model.gradient_checkpointing"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("--gradient_accumulation_steps", ("1",), "train.global_batch_size"),
    "ACCELERATE_GRADIENT_CLIPPING": ("--gradient_clipping", ("none",), "train.max_grad_norm"),
    "ACCELERATE_DYNAMO_BACKEND": ("--dynamo_backend", ("no",), ""),
    "ACCELERATE_USE_MEGATRON_LM": ("--use_megatron_lm", ("false",), "engine"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("--use_parallelism_config", ("false",), "engine"),
}


def ignored_settings() -> list[str]:
    """What the launcher was told of training, which the config alone decides here; each with the key that does."""
    found = []
    for variable, (flag, nothing, key) in _OF_ACCELERATE.items():
        value = os.environ.get(variable, "")
        if value and value.lower() not in nothing:
            told = flag if value.lower() == "true" else f"{flag} {value}"
            found.append(f"{told} ({key})" if key else f"{told} (not offered)")
    return found


def set_local_rank() -> None:
    """DeepSpeed fails without LOCAL_RANK, even in one process."""
    os.environ.setdefault("LOCAL_RANK", "0")
