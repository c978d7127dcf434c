"""`--device-map auto`: a language model over all GPUs, main memory and disk, as much of it on each as fits."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm.errors import ConfigError, MissingPackageError
from vlm.logs import log
from vlm.models.vlm import VisionLanguageModel

_HEADROOM = 0.9  # share of a GPU's free memory that weights may take; the rest is for activations and the cache


def check_device_map(device_map: str | None, offload_folder: str | Path | None, device: str) -> None:
    """
    Raises:
        ConfigError: an unknown map, or flags that contradict each other.
        MissingPackageError: accelerate is not installed.
    """
    if device_map is None:
        if offload_folder is not None:
            raise ConfigError("--offload-folder is for weights that fit in no memory: add --device-map auto")
        return
    if device_map != "auto":
        raise ConfigError(f"--device-map {device_map}: known is auto. For one device use --device {device_map}")
    if device not in ("auto", "cpu"):
        raise ConfigError(f"--device-map auto takes all GPUs, --device {device} one of them. Leave one of the two out")
    if importlib.util.find_spec("accelerate") is None:
        raise MissingPackageError("accelerate", "--device-map auto", "quant")


def spread(model: VisionLanguageModel, offload_folder: str | Path | None, only_cpu: bool) -> torch.device:
    """Put the layers of the language model where they fit; encoder and projector go where its input is.

    Args:
        model: on the CPU.
        offload_folder: for layers that fit in no memory; they are read from there each time they compute.
        only_cpu: leave GPUs alone.

    Returns:
        the device that inputs go to.

    Raises:
        ConfigError: it does not fit and there is no `offload_folder`; or quantized layers would have to leave the GPUs.
    """
    from accelerate import dispatch_model, infer_auto_device_map

    no_split = sorted(model.llm._no_split_modules or [])
    memory = _memory(model, no_split, only_cpu)
    where = infer_auto_device_map(model.llm, max_memory=memory, no_split_module_classes=no_split)
    places = {place if isinstance(place, str) else f"cuda:{place}" for place in where.values()}
    if "disk" in places and offload_folder is None:
        raise ConfigError(
            f"--device-map auto: the language model takes {_size(model.llm) / 2**30:.1f} GiB, free are "
            f"{_named(memory)}. Add --offload-folder DIR to keep the rest on disk (slow), or --bits 4"
        )
    if places - {"cpu"} and places & {"cpu", "disk"} and _is_quantized(model.llm):
        raise ConfigError(
            f"--bits with --device-map auto: the GPUs have room for a part only (free: {_named(memory)}), and "
            "quantized layers compute where they lie. Use --bits 4, more GPUs, or leave --bits out"
        )
    log(f"device map: {', '.join(f'{place} {_count(where, place)}' for place in sorted(places))}")
    if places == {"cpu"}:
        return torch.device("cpu")
    first = "cpu" if only_cpu or not torch.cuda.is_available() else "cuda:0"
    for module in (model.vision, model.projector):
        if module is not None:
            module.to(first)
    if offload_folder is not None:
        Path(offload_folder).mkdir(parents=True, exist_ok=True)
    folder = None if offload_folder is None else str(offload_folder)
    dispatch_model(model.llm, device_map=where, offload_dir=folder)
    return torch.device(first)


def _memory(model: VisionLanguageModel, no_split: list[str], only_cpu: bool) -> dict[Any, int]:
    """Bytes that the language model may take: per GPU by number, and "cpu"."""
    from accelerate.utils import get_balanced_memory, get_max_memory

    free = get_max_memory()
    if only_cpu or not torch.cuda.is_available():
        return {"cpu": free["cpu"]}
    others = sum(_size(module) for module in (model.vision, model.projector) if module is not None)
    room = {key: int(size if key == "cpu" else size * _HEADROOM) for key, size in free.items()}
    room[0] = max(0, room[0] - others)
    balanced: dict[Any, int] = get_balanced_memory(model.llm, max_memory=room, no_split_module_classes=no_split)
    return balanced


def _size(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _is_quantized(llm: nn.Module) -> bool:
    return any(not parameter.is_floating_point() for parameter in llm.parameters())


def _named(memory: dict[Any, int]) -> str:
    names = {key: key if isinstance(key, str) else f"cuda:{key}" for key in memory}
    return ", ".join(f"{names[key]} {size / 2**30:.1f} GiB" for key, size in memory.items())


def _count(where: dict[str, Any], place: str) -> str:
    count = sum(place == (value if isinstance(value, str) else f"cuda:{value}") for value in where.values())
    return f"{count} module{'s' if count > 1 else ''}"
