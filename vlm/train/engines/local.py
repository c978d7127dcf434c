"""One process, or several that each hold the whole model (DistributedDataParallel, torch)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from vlm.batch import Batch
from vlm.distributed import gather_objects, is_main, rank, sum_over_ranks, world_size
from vlm.models.trainable import trained_weights
from vlm.models.vlm import VisionLanguageModel
from vlm.train.engines.base import (
    FragmentState,
    LossModule,
    StepOutput,
    T,
    adam_state,
    shared_adam_state,
    trained_names,
)
from vlm.train.fragments import Fragment
from vlm.train.optim import set_learning_rate
from vlm.train.scaling import LossScale
from vlm.train.statistics import average_statistics


class LocalEngine(FragmentState):
    """See `Engine`. In a launch of several processes the gradients are averaged by DistributedDataParallel."""

    def __init__(
        self,
        module: LossModule,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        max_grad_norm: float | None = 1.0,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.loss_module = module
        self.model = module.model
        self.objective = module.objective
        self.optimizer = optimizer
        self.device = device
        self.max_grad_norm = max_grad_norm
        self.loss_scale = loss_scale
        self.data_rank = rank()
        self.num_data_ranks = world_size()
        self._wrapped: Any = self._wrap(module)
        self.parameters = list(trained_names(self.model))

    holds_whole_model = True

    def train_step(self, microbatches: list[Batch], weight: float, learning_rate: float) -> StepOutput:
        self.model.train()
        factor = self.start_step()
        summed = self._backward(self._wrapped, microbatches, factor * self.num_data_ranks / weight)
        grad_norm = self._grad_norm() / factor
        finite = math.isfinite(summed) and math.isfinite(grad_norm)
        if finite:
            clip = 1.0 if self.max_grad_norm is None else min(1.0, self.max_grad_norm / (grad_norm + 1e-6))
            self._scale_gradients(clip / factor)
            set_learning_rate(self.optimizer, learning_rate)
            self.optimizer.step()
        # DistributedDataParallel's gradients are views of its buckets; dropping them would cost a second copy
        self.optimizer.zero_grad(set_to_none=self._wrapped is self.loss_module)
        average_statistics(self.model)
        return self.step_output(summed / weight, grad_norm, finite)

    def rehearse(self, microbatches: list[Batch], weight: float, look: Callable[[], T]) -> tuple[float, float, T]:
        """Around DistributedDataParallel, whose buckets take their order from the first backward: all ranks have the
        same gradients here."""
        summed = self._backward(self.loss_module, microbatches, self.num_data_ranks / weight)
        seen = summed / weight, self._grad_norm(), look()
        self.optimizer.zero_grad(set_to_none=True)
        return seen

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[float, int]:
        self.model.eval()
        own = [self.loss_module(batch.to(self.device)).item(), float(self.objective.weight(batch))]
        summed, weight = self.sum_over_data_ranks(own)
        return summed, int(weight)

    def sum_over_data_ranks(self, values: list[float]) -> list[float]:
        return sum_over_ranks(values)

    def gather_from_data_ranks(self, value: T) -> list[T]:
        return gather_objects(value)

    def whole_model(self) -> AbstractContextManager[VisionLanguageModel | None]:
        return nullcontext(self.model)

    def weight_fragments(self) -> Iterator[Fragment]:
        """Every rank holds everything, so rank 0 alone writes it; all read it."""
        for name, tensor in trained_weights(self.model).items():
            yield Fragment.whole(name, tensor)

    def optimizer_fragments(self) -> Iterator[Fragment]:
        for name, parameter in self.parameters:
            for key, value in adam_state(self.optimizer, parameter).items():
                yield Fragment.whole(f"{name}/{key}", value)
        yield from shared_adam_state(self.optimizer)

    def save(self, folder: Any) -> None:
        if is_main():
            super().save(folder)

    def _backward(self, forward: Callable[[Batch], Tensor], microbatches: list[Batch], scale: float) -> float:
        """Add up the gradients of `scale` times the loss. Returns the summed loss of all ranks."""
        summed = 0.0
        for number, batch in enumerate(microbatches):
            with self._reduction(number == len(microbatches) - 1):
                loss = forward(batch.to(self.device))
                (loss * scale).backward()
            summed += loss.item()
        return self.sum_over_data_ranks([summed])[0]

    def _wrap(self, module: LossModule) -> Any:
        if self.num_data_ranks == 1:
            return module
        with warnings.catch_warnings():  # torch 2.13 renames broadcast_buffers, 2.10 knows no other name
            warnings.simplefilter("ignore", FutureWarning)
            # a copy of the gradients would double their memory; buffers that change are averaged after each step
            return DistributedDataParallel(module, gradient_as_bucket_view=True, broadcast_buffers=False)

    def _reduction(self, is_last: bool) -> Any:
        """Gradients are summed over ranks with the last micro-batch only."""
        return nullcontext() if is_last or self.num_data_ranks == 1 else self._wrapped.no_sync()

    def _grad_norm(self) -> float:
        return torch.nn.utils.get_total_norm(self._gradients()).item()

    def _scale_gradients(self, factor: float) -> None:
        if factor < 1.0:
            torch._foreach_mul_(self._gradients(), factor)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for _, p in self.parameters if p.grad is not None]
