"""One process: CPU or one GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from vlm.batch import Batch
from vlm.errors import CheckpointError
from vlm.faults import fault
from vlm.models.trainable import load_weights, trained_weights
from vlm.models.vlm import VisionLanguageModel
from vlm.objectives.lm import Objective
from vlm.train.checkpoint import save_tensors
from vlm.train.engines.base import StepOutput
from vlm.train.optim import set_learning_rate


class LocalEngine:
    """See `Engine`. `autocast_dtype` None computes in the weights' own dtype."""

    data_rank = 0
    num_data_ranks = 1

    def __init__(
        self,
        model: VisionLanguageModel,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        autocast_dtype: torch.dtype | None = None,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        self.model = model
        self.objective = objective
        self.optimizer = optimizer
        self.device = device
        self.autocast_dtype = autocast_dtype
        self.max_grad_norm = max_grad_norm
        self.parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def train_step(self, microbatches: list[Batch], weight: float, learning_rate: float) -> StepOutput:
        self.model.train()
        summed = 0.0
        for batch in microbatches:
            loss = self._loss(batch)
            if fault("loss") == "nan":
                loss = loss * math.nan
            (loss / weight).backward()
            summed += loss.item()
        grad_norm = torch.nn.utils.get_total_norm([p.grad for _, p in self.parameters if p.grad is not None]).item()
        finite = math.isfinite(summed) and math.isfinite(grad_norm)
        if finite:
            if self.max_grad_norm is not None:
                self._scale_gradients(min(1.0, self.max_grad_norm / (grad_norm + 1e-6)))
            set_learning_rate(self.optimizer, learning_rate)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepOutput(loss=summed / weight, grad_norm=grad_norm, applied=finite)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[float, int]:
        self.model.eval()
        return self._loss(batch).item(), self.objective.weight(batch)

    def sum_over_data_ranks(self, value: float) -> float:
        return value

    def save(self, folder: Path) -> None:
        (folder / "engine").mkdir()
        save_tensors({name: _plain(tensor) for name, tensor in self.trained_weights()}, folder / "weights.safetensors")
        fault("save:shard")
        save_tensors(self._optimizer_tensors(), folder / "engine" / "optimizer.safetensors")

    def load(self, folder: Path) -> None:
        load_weights(self.model, load_file(folder / "weights.safetensors"), where=str(folder / "weights.safetensors"))
        self._load_optimizer(folder / "engine" / "optimizer.safetensors")

    def trained_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from trained_weights(self.model).items()

    def _loss(self, batch: Batch) -> Tensor:
        batch = batch.to(self.device)
        enabled = self.autocast_dtype is not None
        with torch.autocast(self.device.type, dtype=self.autocast_dtype or torch.bfloat16, enabled=enabled):
            return self.objective.loss(self.model, batch)

    def _scale_gradients(self, factor: float) -> None:
        if factor < 1.0:
            torch._foreach_mul_([p.grad for _, p in self.parameters if p.grad is not None], factor)

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        """`<parameter>/<state>` -> tensor, for every state that the optimizer keeps."""
        return {
            f"{name}/{key}": _plain(value)
            for name, parameter in self.parameters
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def _load_optimizer(self, path: Path) -> None:
        tensors = load_file(path)
        parameters = dict(self.parameters)
        for full_name, value in tensors.items():
            name, _, key = full_name.rpartition("/")
            if name not in parameters:
                raise CheckpointError(
                    f"{path}: optimizer state of {name}, which this config does not train. Usually the config's "
                    "trainable parts changed since the checkpoint: restore them, or start in another output_dir"
                )
            # `step` stays where the optimizer keeps it: on the CPU unless fused
            device = "cpu" if key == "step" and not self._fused() else parameters[name].device
            self.optimizer.state[parameters[name]][key] = value.to(device)

    def _fused(self) -> bool:
        return bool(self.optimizer.defaults.get("fused"))


def _plain(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares no memory, as safetensors demands."""
    return tensor.detach().to("cpu", copy=True).contiguous()
