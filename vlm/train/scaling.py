"""The factor of the loss that lets float16 train: one rule for every engine."""

from __future__ import annotations

import math

import torch

INITIAL = 65536.0  # as torch's GradScaler
GROWTH_INTERVAL = 2000  # steps without an overflow after which the factor is doubled


class LossScale:
    """Loss times a power of two, gradients divided by it again (Micikevicius et al. 2018, arXiv:1710.03740).

    So small gradients do not vanish in float16. One that overflows instead spoils its step, which is skipped, and the
    factor is halved. At a factor of 1 nothing more can be done about it, and the step counts as bad.

    Attributes:
        state: [factor, steps since it changed], float64; a checkpoint holds it.
    """

    def __init__(self, initial: float = INITIAL, growth_interval: int = GROWTH_INTERVAL) -> None:
        self.state = torch.tensor([initial, 0.0], dtype=torch.float64)
        self.growth_interval = growth_interval

    @property
    def factor(self) -> float:
        return self.state[0].item()

    def settle(self, loss: float, grad_norm: float) -> bool:
        """Take note of a step. Every rank must give the same numbers, those of all ranks.

        Returns:
            whether the step overflowed: its loss is finite, its gradients are not, and a smaller factor may help.
        """
        factor, num_good = self.state.tolist()
        if not math.isfinite(loss):  # the forward's doing, which the factor has no part in
            return False
        if math.isfinite(grad_norm):
            grows = num_good + 1 >= self.growth_interval
            self.state.copy_(torch.tensor([2 * factor, 0.0] if grows else [factor, num_good + 1]))
            return False
        self.state.copy_(torch.tensor([max(1.0, factor / 2), 0.0]))
        return factor > 1.0


def loss_scale_for(precision: str) -> LossScale | None:
    return LossScale() if precision == "fp16" else None
