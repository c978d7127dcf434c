"""DeepSpeed's config from ours, and a user's own DeepSpeed JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vlm.errors import ConfigError
from vlm.logs import warn
from vlm.train.config import TrainConfig

_AUTO = "auto"
# parts of a DeepSpeed config that say what ours says already
_OURS = ("optimizer", "scheduler", "bf16", "fp16", "torch_autocast", "amp")
_READ = (  # of them: what is compared with ours
    "optimizer.type", "optimizer.params.lr", "optimizer.params.weight_decay", "optimizer.params.betas",
    "bf16.enabled", "fp16.enabled",
)  # fmt: skip


def deepspeed_settings(
    train: TrainConfig,
    file: str | None,
    *,
    stage: int,
    offload: Collection[str],
    accumulation_steps: int,
    num_data_ranks: int,
    num_trained: int = 0,
) -> dict[str, Any]:
    """What deepspeed.initialize gets.

    Args:
        file: the user's own JSON, as `engine.deepspeed` names it.
        stage: ZeRO's.
        offload: "optimizer" and "parameters" wait in the host's memory.
        accumulation_steps: micro-batches per optimizer step on each data rank.
        num_trained: elements of all that trains, which bounds the buffer that gradients are reduced in.

    Raises:
        ConfigError: engine.deepspeed is no readable JSON, or it contradicts the config; names every pair of values.
    """
    zero: dict[str, Any] = {"stage": stage}
    if "optimizer" in offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if "parameters" in offload:
        zero["offload_param"] = {"device": "cpu"}
    settings: dict[str, Any] = {
        "train_batch_size": train.micro_batch_size * accumulation_steps * num_data_ranks,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": train.max_grad_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own CPU Adam is compiled at first use; torch's gives the same
        "steps_per_print": 1 << 60,
    }
    if num_trained:  # DeepSpeed's buffer is of 5e8 elements whatever trains
        zero["reduce_bucket_size"] = min(500_000_000, num_trained)
    if file is not None:
        own = read_json(file)
        _refuse_contradictions(file, train, settings, own)
        if unread := _unread(own):
            warn(f"engine.deepspeed: {file}: {', '.join(unread)} change nothing: train.* of the config decides")
        _merge(settings, {key: value for key, value in own.items() if key not in _OURS})
    return settings


def read_json(path: str) -> dict[str, Any]:
    """Raises ConfigError naming the file."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"engine.deepspeed: {path} cannot be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"engine.deepspeed: {path} holds a {type(values).__name__}, not an object of settings")
    return values


def _refuse_contradictions(file: str, train: TrainConfig, settings: dict[str, Any], own: dict[str, Any]) -> None:
    pairs = _compared(train, settings)
    problems = []
    for path, ours, name in pairs:
        theirs = _look_up(own, path)
        if theirs is not None and theirs != _AUTO and theirs != ours:
            problems.append(f"  {path} {theirs!r}, but {name} {ours!r}")
    if problems:
        raise ConfigError(
            f"engine.deepspeed: {file} contradicts the config:\n" + "\n".join(problems) + "\nMake them "
            'agree, remove the setting from the JSON, or write "auto" there'
        ).on_every_rank()


def _compared(train: TrainConfig, settings: dict[str, Any]) -> list[tuple[str, Any, str]]:
    """What a JSON may say only as the config does: place in the JSON, our value, and its name."""
    zero = settings["zero_optimization"]
    bf16, fp16 = train.precision.startswith("bf16"), train.precision == "fp16"
    return [
        ("train_batch_size", settings["train_batch_size"], "train.global_batch_size"),
        ("train_micro_batch_size_per_gpu", train.micro_batch_size, "train.micro_batch_size"),
        (
            "gradient_accumulation_steps",
            settings["gradient_accumulation_steps"],
            "train.global_batch_size / (train.micro_batch_size x data ranks), which is",
        ),
        ("gradient_clipping", settings["gradient_clipping"], "train.max_grad_norm"),
        ("zero_optimization.stage", zero["stage"], "engine.stage"),
        (
            "zero_optimization.offload_optimizer.device",
            _device(zero, "offload_optimizer"),
            "engine.offload, which gives",
        ),
        ("zero_optimization.offload_param.device", _device(zero, "offload_param"), "engine.offload, which gives"),
        ("optimizer.type", "AdamW", "the optimizer here,"),
        ("optimizer.params.lr", train.learning_rate, "train.learning_rate"),
        ("optimizer.params.weight_decay", train.weight_decay, "train.weight_decay"),
        ("optimizer.params.betas", list(train.betas), "train.betas"),
        ("bf16.enabled", bf16, f"train.precision {train.precision}, so"),
        ("fp16.enabled", fp16, f"train.precision {train.precision}, so"),
        ("zero_optimization.compute_grad_norm", True, "every step's norm is looked at, so"),
        ("zero_optimization.zero_hpz_partition_size", 1, "checkpoints need weights split over all ranks, so"),
    ]


def _unread(own: dict[str, Any]) -> list[str]:
    """Settings within `_OURS` that are neither compared with ours nor "auto"; of a part that is off, none."""
    found = []
    for part in _OURS:
        values = own.get(part)
        is_off = isinstance(values, dict) and values.get("enabled") is False
        for key, value in values.items() if isinstance(values, dict) and not is_off else ():
            inner = value if isinstance(value, dict) else {"": value}
            paths = {f"{part}.{key}.{name}".rstrip("."): leaf for name, leaf in inner.items()}
            found += [path for path, leaf in paths.items() if leaf != _AUTO and path not in _READ]
    return found


def _device(zero: dict[str, Any], what: str) -> str:
    return zero.get(what, {}).get("device", "none")


def _look_up(values: Any, path: str) -> Any:
    for key in path.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _merge(settings: dict[str, Any], own: dict[str, Any]) -> None:
    """Add what the user's JSON says and ours does not."""
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(settings.get(key), dict):
            _merge(settings[key], value)
        elif value != _AUTO:
            settings[key] = value
