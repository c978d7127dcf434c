"""A stage of ours as the module that DeepSpeed's pipeline engine runs, and its optimizer groups."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from vlm.batch import Batch
from vlm.models.pipeline import InputsLayer, OutputLayer, num_layers, run_layers
from vlm.models.pipeline_build import Stage
from vlm.objectives.base import Head, Objective
from vlm.precision import autocast
from vlm.train.config import TrainConfig
from vlm.train.engines.base import Sums, poison, spoil, stack_metrics
from vlm.train.optim import group_key, parameter_groups


class StageRun:
    """What one stage does with the micro-batches of a step, in order. Losses are summed where they are made.

    Every stage has the micro-batches, so DeepSpeed carries nothing but hidden states.
    """

    def __init__(
        self, stage: Stage, objective: Objective, device: torch.device, autocast_dtype: torch.dtype | None
    ) -> None:
        self.stage = stage
        self.objective = objective
        self.device = device
        self.autocast_dtype = autocast_dtype
        self.sums = Sums(objective, device)  # of the step; zeros on all stages but the last
        self._batches: Iterator[Batch] = iter(())
        self._scale = 1.0

    def start(self, batches: Sequence[Batch], scale: float = 1.0) -> None:
        """Before a step. `scale`: factor of the loss that is differentiated."""
        self.sums = Sums(self.objective, self.device)
        self._batches = iter(batches)
        self._scale = scale

    def forward(self, received: Tensor) -> Tensor:
        """[B, L, D] from the stage before, or anything on the first -> [B, L, D], or the scalar loss on the last."""
        batch = next(self._batches)
        if not self.stage.is_first:  # nobody looks at images here
            batch = dataclasses.replace(batch, pixel_values=None, image_features=None)
        batch = batch.to(self.device)
        hidden_states = None if self.stage.is_first else received
        with autocast(self.device.type, self.autocast_dtype):
            output = run_layers(self.stage.built.model, self.stage.layers, batch, hidden_states)
            if self.stage.is_last:
                return self._loss(output, batch)
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()  # of a frozen first stage; DeepSpeed differentiates what every stage sends
        return output

    def _loss(self, hidden_states: Tensor, batch: Batch) -> Tensor:
        """[B, L, D] -> scalar, scaled for the backward; NaN if it is not finite."""
        model = self.stage.built.model
        output = self.objective.loss(hidden_states, batch, Head(model.logits, values=model.values))
        loss = spoil(output.loss)
        self.sums.add(loss, stack_metrics(output, self.objective.metric_names))
        return poison(loss) * self._scale  # of NaN, DeepSpeed leaves the weights of every stage as they are


def stage_groups(stage: Stage, train: TrainConfig) -> list[dict[str, Any]]:
    """The optimizer groups of the whole model, each with this stage's share.

    DeepSpeed sums the norm group by group over the stages, so every stage needs the same groups in the same order. A
    group of which it holds nothing gets a parameter that nothing uses.
    """
    own = {group["key"]: group for group in parameter_groups(stage.built.model, train)}
    wanted = dict.fromkeys(
        group_key(name, name not in stage.undecayed, train) for name in stage.shapes if name in stage.trained
    )
    return [
        own.get(key)
        or {"params": [nn.Parameter(torch.zeros(1))], "weight_decay": 0.0, "initial_lr": 0.0, "part": key[0]}
        for key in wanted
    ]


def pipeline_module(stage: Stage, run: StageRun, groups: list[dict[str, Any]], num_data_ranks: int) -> Any:
    """DeepSpeed's `PipelineModule` of this stage's layers, cut where our cuts are.

    Args:
        groups: of `stage_groups`; their unused parameters become part of the module.
    """
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    own = {type(layer): layer for layer in stage.layers}
    first = [0, *stage.cuts][stage.number]
    total = num_layers(stage.built.model.llm)

    class Own(LayerSpec):  # type: ignore[misc, no-any-unimported]
        def __init__(self, layer: nn.Module | None) -> None:
            super().__init__(nn.Module)
            self.layer = layer

        def build(self, log: bool = False) -> Any:
            return self.layer

    class OwnTied(TiedLayerSpec):  # type: ignore[misc, no-any-unimported]
        def __init__(self, layer: nn.Module | None, weight: str) -> None:
            super().__init__("embedding", nn.Module, tied_weight_attr=weight)
            self.layer = layer

        def build(self, log: bool = False) -> Any:
            return self.layer

    class Module(PipelineModule):  # type: ignore[misc, no-any-unimported]
        def _partition_layers(self, method: str = "") -> None:
            self.parts = [0, *stage.cuts, total]
            self._set_bounds(self.parts[stage.number], self.parts[stage.number + 1])

        def forward(self, forward_input: Tensor) -> Tensor:
            """[B, L, D] -> [B, L, D], or a scalar; see `StageRun.forward`."""
            return run.forward(forward_input)

    specs: list[Any] = [Own(None)] * total
    for index, layer in enumerate(stage.layers, first):
        specs[index] = Own(layer)
    if stage.tied_name in stage.trained and not any(name.startswith("value_head.") for name in stage.trained):
        specs[0] = OwnTied(own.get(InputsLayer), "embed.weight")
        specs[-1] = OwnTied(own.get(OutputLayer), "head.weight")
    with _quiet():
        topology = PipeDataParallelTopology(num_pp=stage.num_stages, num_dp=num_data_ranks)
        # dynamic_shape: held-out rows may be fewer than training's; the shape travels ahead of each activation
        module = Module(specs, topology=topology, loss_fn=None, dynamic_shape=True)
    _mark_copies(module, stage)
    held = set(module.parameters())
    module.unused = nn.ParameterList([p for group in groups for p in group["params"] if p not in held])
    return module


def _mark_copies(module: Any, stage: Stage) -> None:
    """DeepSpeed takes all weights of a tied layer for copies and leaves them out of the norm; only the head is one."""
    is_copied = stage.is_last and stage.tied_name in stage.trained
    parameter: Any
    for name, parameter in stage.built.model.named_parameters():
        parameter.ds_pipe_replicated = is_copied and name == stage.tied_head


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints its topology and layers."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield
