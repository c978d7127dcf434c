"""Optimizer groups and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlm.models.decay import undecayed
from vlm.models.trainable import part_of
from vlm.train.bitsandbytes_adamw import bitsandbytes_adamw
from vlm.train.config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """Factor of the learning rates: linear warm-up to 1, then `shape` down to `floor` at `max_steps`.

    Shape "step" falls to `decay_factor` every `decay_every` steps after the warm-up, and not below `floor`. The cosine
    is half a period, after Loshchilov & Hutter 2017, arXiv:1608.03983.
    """

    shape: str  # constant, linear, cosine, step
    floor: float
    warmup_steps: int  # optimizer steps
    max_steps: int  # optimizer steps
    warmup_start: float = 0.0  # factor that the warm-up rises from
    decay_every: int = 1  # optimizer steps, of shape step
    decay_factor: float = 0.1  # of shape step

    def __call__(self, step: int) -> float:
        """Of optimizer step `step`, counted from 0.

        >>> [Schedule("linear", 0.0, 2, 6)(step) for step in range(7)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
        """
        if step < self.warmup_steps:
            return self.warmup_start + (1.0 - self.warmup_start) * (step + 1) / self.warmup_steps
        if self.shape == "constant":
            return 1.0
        if self.shape == "step":
            return max(self.floor, self.decay_factor ** ((step - self.warmup_steps) // self.decay_every))
        done = min(1.0, (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps))
        left = 1.0 - done if self.shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.floor + (1.0 - self.floor) * left


def build_schedule(config: TrainConfig, max_steps: int) -> Schedule:
    warmup = config.warmup_steps
    if warmup is None:
        warmup = math.ceil((config.warmup_ratio or 0.0) * max_steps)
    return Schedule(
        shape=config.schedule,
        floor=config.min_learning_rate_ratio,
        warmup_steps=min(warmup, max_steps),
        max_steps=max_steps,
        warmup_start=config.warmup_start_ratio,
        decay_every=config.decay_every or 1,
        decay_factor=config.decay_factor or 0.1,
    )


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """One group per `group_key`; see `vlm.models.decay` for what is decayed.

    Each group has its peak rate as `initial_lr`, as torch's own schedulers call it.
    """
    left_alone = undecayed(model)
    rates: dict[str, float] = {str(part): rate for part, rate in config.learning_rates.items()}
    groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(group_key(name, name not in left_alone, config), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            "initial_lr": rates.get(part, config.learning_rate) * (config.lora_b_rate_ratio if is_second else 1.0),
            "part": part,
            "key": (part, decays, is_second),
        }
        for (part, decays, is_second), parameters in groups.items()
    ]


def group_key(name: str, decays: bool, config: TrainConfig) -> tuple[str, bool, bool]:
    """What the weights of a group have in common: part, decay, and being the second matrix of adapters, where that one
    has a rate of its own (LoRA+, Hayou et al. 2024, arXiv:2402.12354)."""
    return part_of(name), decays, config.lora_b_rate_ratio != 1.0 and ".lora_B." in name


def build_optimizer(
    model: nn.Module, config: TrainConfig, groups: list[dict[str, Any]] | None = None
) -> torch.optim.Optimizer:
    """AdamW of torch, or of bitsandbytes as `train.optimizer` says.

    Args:
        groups: None takes `parameter_groups`.

    Raises:
        MissingPackageError: bitsandbytes is not installed.
    """
    groups = parameter_groups(model, config) if groups is None else groups
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    return bitsandbytes_adamw(groups, config)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def describe_sizes(shapes: Mapping[str, Sequence[int]], trained: Collection[str], config: TrainConfig) -> str:
    """One line for the log: parameters of the model, and what trains at which peak rate.

    "1,500 parameters, 1,020 trained: projector 1,000 (rate 0.001), llm.lora 20 (rate 0.0001)"
    """
    rates: dict[str, float] = {str(part): rate for part, rate in config.learning_rates.items()}
    totals: dict[str, int] = {}
    for name in shapes:
        if name in trained:
            totals[part_of(name)] = totals.get(part_of(name), 0) + math.prod(shapes[name])
    everything = sum(math.prod(shape) for shape in shapes.values())
    parts = ", ".join(
        f"{part} {count:,} (rate {rates.get(part, config.learning_rate):g})" for part, count in totals.items()
    )
    return f"{everything:,} parameters, {sum(totals.values()):,} trained: {parts}"
