"""The step of engines that run in torch alone: one process, DistributedDataParallel, fully_shard."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor

from vlm.batch import Batch
from vlm.distributed import rank, world_size
from vlm.models.trainable import part_of
from vlm.train.engines.base import Engine, LossModule, StepOutput, Sums, T
from vlm.train.engines.kind import EngineInputs
from vlm.train.optim import build_optimizer, set_learning_rates
from vlm.train.scaling import LossScale
from vlm.train.statistics import average_statistics


class TorchEngine(Engine):
    """What these engines share; they differ in what wraps the module and in who holds which elements."""

    def __init__(
        self,
        module: LossModule,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        max_grad_norm: float | None = 1.0,
        loss_scale: LossScale | None = None,
    ) -> None:
        super().__init__(module.model, module.objective, device, module.autocast_dtype, loss_scale)
        self.loss_module = module
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.data_rank = rank()
        self.num_data_ranks = world_size()
        self.wrapped = self.wrap(module)

    @property
    def computes_loss(self) -> LossModule:
        return self.loss_module

    @classmethod
    def over(cls, module: LossModule, inputs: EngineInputs) -> Self:
        """The engine, with a new optimizer of what trains in the module."""
        return cls(
            module,
            build_optimizer(module.model, inputs.train),
            device=inputs.device,
            max_grad_norm=inputs.train.max_grad_norm,
            loss_scale=inputs.loss_scale,
        )

    @abstractmethod
    def wrap(self, module: LossModule) -> Any:
        """What calls the module and sums gradients over the ranks."""

    @abstractmethod
    def reduction(self, is_last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch: gradients are summed over ranks with the last one only."""

    @abstractmethod
    def grad_norm(self) -> Tensor:
        """Of all trained weights; scalar."""

    def train_step(self, microbatches: list[Batch], normalizer: float, lr_factor: float) -> StepOutput:
        self.model.train()
        factor = self.start_step()
        with self.timer("forward_backward"):
            sums = self._backward(self.wrapped, microbatches, factor * self.num_data_ranks / normalizer)
        with self.timer("optimizer"):
            self._leave_still()
            grad_norm = self.grad_norm().item() / factor
            finite = math.isfinite(sums[0]) and math.isfinite(grad_norm)
            if finite:
                clip = 1.0 if self.max_grad_norm is None else min(1.0, self.max_grad_norm / (grad_norm + 1e-6))
                self._scale_gradients(clip / factor)
                set_learning_rates(self.optimizer, lr_factor)
                self.optimizer.step()
            # DistributedDataParallel's gradients are views of its buckets; dropping them would cost a second copy
            self.optimizer.zero_grad(set_to_none=self.wrapped is self.loss_module)
        average_statistics(self.model)
        return self.step_output(sums, normalizer, grad_norm, finite)

    def rehearse(self, microbatches: list[Batch], normalizer: float, look: Callable[[], T]) -> tuple[float, float, T]:
        """Around DistributedDataParallel, whose buckets take their order from the first backward: all ranks have the
        same gradients here."""
        loss, *_ = self._backward(self.loss_module, microbatches, self.num_data_ranks / normalizer)
        self._leave_still()
        seen = loss / normalizer, self.grad_norm().item(), look()
        self.optimizer.zero_grad(set_to_none=True)
        return seen

    @torch.no_grad()
    def evaluate_sums(self, batch: Batch) -> tuple[list[float], int]:
        self.model.eval()
        loss, metrics = self.loss_module(batch.to(self.device))
        own = [loss.item(), *metrics.tolist(), float(self.objective.normalizer(batch))]
        *sums, normalizer = self.sum_over_data_ranks(own)
        return sums, int(normalizer)

    def gradients(self) -> list[Tensor]:
        """Of each trained weight that has one, of the weight's shape [...]."""
        return [p.grad for _, p in self.parameters if p.grad is not None]

    def _backward(
        self, forward: Callable[[Batch], tuple[Tensor, Tensor]], microbatches: list[Batch], scale: float
    ) -> list[float]:
        """Add up the gradients of `scale` times the loss. Returns loss and metrics, summed over all ranks.

        Args:
            forward: yields a scalar loss and metrics [M].
        """
        sums = Sums(self.objective, self.device)
        for number, batch in enumerate(microbatches):
            with self.reduction(number == len(microbatches) - 1):
                loss, metrics = forward(batch.to(self.device))
                (loss * scale).backward()
            sums.add(loss, metrics)
        return self.sum_over_data_ranks(sums.read())

    def _leave_still(self) -> None:
        """Without a gradient a weight counts in no norm, is not decayed, and its moments begin when it thaws."""
        for name, parameter in self.parameters if self.still else ():
            if part_of(name) in self.still:
                parameter.grad = None

    def _scale_gradients(self, factor: float) -> None:
        if factor < 1.0:
            torch._foreach_mul_(self.gradients(), factor)
