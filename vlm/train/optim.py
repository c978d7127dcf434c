"""Optimizer groups and learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from vlm.models.trainable import part_of
from vlm.train.config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak`, then `shape` down to `floor` at `max_steps`.

    The cosine is half a period, after Loshchilov & Hutter 2017, arXiv:1608.03983.
    """

    shape: str  # constant, linear, cosine
    peak: float
    floor: float
    warmup_steps: int  # optimizer steps
    max_steps: int  # optimizer steps

    def __call__(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0.

        >>> [Schedule("linear", 1.0, 0.0, 2, 6)(step) for step in range(7)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
        """
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.shape == "constant":
            return self.peak
        done = min(1.0, (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps))
        left = 1.0 - done if self.shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.floor + (self.peak - self.floor) * left


def build_schedule(config: TrainConfig, max_steps: int) -> Schedule:
    warmup = config.warmup_steps
    if warmup is None:
        warmup = math.ceil((config.warmup_ratio or 0.0) * max_steps)
    return Schedule(
        shape=config.schedule,
        peak=config.learning_rate,
        floor=config.learning_rate * config.min_learning_rate_ratio,
        warmup_steps=min(warmup, max_steps),
        max_steps=max_steps,
    )


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with one group per trainable part and decay. Norms, biases and other vectors are not decayed.

    Each group's learning rate is `lr_scale` times the schedule's: `learning_rates[part] / learning_rate`.
    """
    rates: dict[str, float] = {str(part): rate for part, rate in config.learning_rates.items()}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_of(name), parameter.ndim >= 2), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": config.weight_decay if decays else 0.0,
                "lr_scale": rates.get(part, config.learning_rate) / config.learning_rate,
                "part": part,
            }
            for (part, decays), parameters in groups.items()
        ],
        lr=config.learning_rate,
        betas=config.betas,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]


def describe_groups(optimizer: torch.optim.Optimizer) -> str:
    """One line for the log: parameters and learning-rate scale per part.

    "projector 1,000 (x1), llm.lora 20 (x0.1)"
    """
    totals: dict[str, tuple[int, float]] = {}
    for group in optimizer.param_groups:
        count = sum(parameter.numel() for parameter in group["params"])
        totals[group["part"]] = (totals.get(group["part"], (0, 0))[0] + count, group["lr_scale"])
    return ", ".join(f"{part} {count:,} (x{scale:g})" for part, (count, scale) in totals.items())
