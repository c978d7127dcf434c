"""The one interface between the loop and any way of spreading a model over processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from vlm.batch import Batch
from vlm.distributed import rank
from vlm.errors import CheckpointError
from vlm.faults import fault
from vlm.models.vlm import VisionLanguageModel
from vlm.objectives.lm import Objective
from vlm.train.fragments import Fragment, FragmentReader, state_files, write_fragments

T = TypeVar("T")


@dataclass(frozen=True)
class StepOutput:
    """What one optimizer step did."""

    loss: float  # mean over the step's weight and all data ranks: nats per supervised token
    grad_norm: float  # before clipping, over all trained weights
    applied: bool  # false when loss or gradient norm was not finite: the weights are as before


class Engine(Protocol):
    """One call of `train_step` is one optimizer step. Every rank makes the same calls in the same order."""

    data_rank: int  # which share of the stream this process takes; equal for all stages of one pipeline
    num_data_ranks: int

    def train_step(self, microbatches: list[Batch], weight: float, learning_rate: float) -> StepOutput:
        """Forward and backward over the micro-batches, clip, update. `weight` divides the summed loss."""

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """Summed loss and weight over all data ranks, without a gradient."""

    def sum_over_data_ranks(self, values: list[float]) -> list[float]: ...

    def gather_from_data_ranks(self, value: T) -> list[T]:
        """What each data rank gave, in order, on every rank."""

    def whole_model(self) -> AbstractContextManager[VisionLanguageModel | None]:
        """The model to generate with; every rank makes the same calls. None where no rank has access to all of it."""

    def save(self, folder: Path) -> None:
        """Write this rank's share of weights/ and optimizer/ below `folder`. Communicates nothing."""

    def load(self, folder: Path) -> None:
        """Read what any engine on any number of ranks wrote. Raises CheckpointError for each tensor that is missing."""


class LossModule(nn.Module):
    """Batch -> summed loss, as one module whose forward holds all that computes, for engines to wrap.

    Args:
        autocast_dtype: of the computation; None computes in the weights' own dtype.
    """

    def __init__(
        self, model: VisionLanguageModel, objective: Objective, autocast_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.autocast_dtype = autocast_dtype

    def forward(self, batch: Batch, num_chunks: int = 1) -> Tensor:
        """Float32 scalar. `num_chunks`: the loss is computed in at least so many pieces, so that ranks agree."""
        enabled = self.autocast_dtype is not None
        device = batch.input_ids.device.type
        with torch.autocast(device, dtype=self.autocast_dtype or torch.bfloat16, enabled=enabled):
            loss = self.objective.loss(self.model, batch, num_chunks)
        return loss * float("nan") if fault("loss") == "nan" else loss


class FragmentState:
    """Saving and loading for an engine that can name the elements it holds.

    Both methods yield live views: writing into `values` changes the engine's state.
    """

    def weight_fragments(self) -> Iterable[Fragment]:
        """Everything that trains, in float32, with the statistics that belong to it."""
        raise NotImplementedError

    def optimizer_fragments(self) -> Iterable[Fragment]:
        """`<canonical name>/<state>` of every optimizer state, made with zeros where no step was done yet."""
        raise NotImplementedError

    def after_load(self) -> None:
        """Bring everything derived from the loaded weights up to date."""

    def save(self, folder: Path) -> None:
        write_fragments(self.weight_fragments(), folder / "weights", rank())
        fault("save:shard")
        write_fragments(self.optimizer_fragments(), folder / "optimizer", rank())

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        for part, own in (("weights", self.weight_fragments()), ("optimizer", self.optimizer_fragments())):
            reader = FragmentReader(state_files(folder, part))
            problems = []
            for fragment in own:
                found = reader.shapes.get(fragment.name)
                if found != fragment.shape:
                    problems.append(f"  {fragment.name}: {_shape(found)} -> {_shape(fragment.shape)}")
                elif not problems:
                    fragment.values.copy_(reader.read(fragment.name, fragment.start, fragment.values.numel()))
            if problems:
                raise CheckpointError(
                    f"{folder / part} does not fit this model (file -> model):\n" + "\n".join(problems[:20]) + "\n"
                    "Usually the config's trainable parts changed since the checkpoint: restore them, or start in "
                    "another output_dir with init_from"
                )
        self.after_load()


def adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """The optimizer's state of one parameter, made with zeros as AdamW's first step would if there is none yet."""
    state = optimizer.state[parameter]
    if not state:
        on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


def trained_names(model: VisionLanguageModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Canonical name and parameter of everything that trains."""
    from vlm.models.trainable import canonical_name

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield canonical_name(name), parameter


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
