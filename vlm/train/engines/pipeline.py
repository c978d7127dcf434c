"""The model cut into stages, one per process, over DeepSpeed's pipeline engine.

Always with ZeRO-1 over the data ranks of a stage: DeepSpeed's own norm is right with it only. As in every engine
trained weights are float32, frozen ones keep their dtype and our autocast rules the computation, so DeepSpeed works in
its float32 mode; hidden states travel in the dtype that the token embedding gives them, as within one process.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist

from vlm.batch import Batch
from vlm.distributed import gather_objects, sum_over_ranks
from vlm.models.pipeline_build import Stage, load_stage_weights
from vlm.models.vlm import VisionLanguageModel
from vlm.models.weight_files import LazyTensors
from vlm.objectives.base import Objective
from vlm.train.config import TrainConfig
from vlm.train.engines.base import Engine, StepOutput, T
from vlm.train.engines.pipeline_module import StageRun, pipeline_module, stage_groups
from vlm.train.engines.zero import initialize_deepspeed, scale_deepspeed, start_deepspeed, zero_fragments
from vlm.train.fragments import Fragment, FragmentReader, state_files
from vlm.train.optim import build_optimizer, set_learning_rates
from vlm.train.scaling import LossScale
from vlm.train.statistics import average_statistics


@final
class PipelineEngine(Engine):
    """See `Engine`. Process r holds stage r // num_data_ranks and takes share r % num_data_ranks of the data.

    Args:
        stage: what this process holds, with its starting weights.
        objective: of the last stage; the others ask it for the normalizer only.
        settings: DeepSpeed's config, of ZeRO stage 1; see `vlm.train.engines.deepspeed_settings`.
        num_data_ranks: processes per stage.
    """

    def __init__(
        self,
        stage: Stage,
        objective: Objective,
        train: TrainConfig,
        settings: dict[str, Any],
        *,
        num_data_ranks: int,
        device: torch.device,
        autocast_dtype: torch.dtype | None = None,
        loss_scale: LossScale | None = None,
    ) -> None:
        assert settings["zero_optimization"]["stage"] == 1
        super().__init__(stage.built.model, objective, device, autocast_dtype, loss_scale)
        self.stage = stage
        self.num_data_ranks = num_data_ranks
        self._run = StageRun(stage, objective, device, autocast_dtype)
        groups = stage_groups(stage, train)
        start_deepspeed(device)
        module = pipeline_module(stage, self._run, groups, num_data_ranks)
        self.optimizer = build_optimizer(self.model, train, groups)
        self._engine = initialize_deepspeed(module, self.optimizer, settings, device)
        self._zero: Any = self._engine.optimizer  # DeepSpeed's, around ours
        self._zero.step = self.timer("optimizer")(self._zero.step)  # which `train_batch` calls
        self.data_rank = self._engine.grid.get_data_parallel_rank()

    @property
    def computes_loss(self) -> StageRun:
        return self._run

    def train_step(self, microbatches: list[Batch], normalizer: float, lr_factor: float) -> StepOutput:
        count = len(microbatches)
        if self._engine.micro_batches != count:
            self._engine.set_train_batch_size(self._engine.micro_batch_size * count * self.num_data_ranks)
        self.model.train()
        set_learning_rates(self.optimizer, lr_factor)
        scale_deepspeed(self._zero, self.start_step())
        self._run.start(microbatches, count * self.num_data_ranks / normalizer)  # DeepSpeed divides by both again
        with self.timer("forward_backward"):
            self._engine.train_batch(_nothing())
        applied = bool(self._engine.was_step_applied())
        grad_norm = float(self._engine.get_global_grad_norm()) if applied else math.inf
        sums = sum_over_ranks(self._run.sums.read())  # only last stages have some
        average_statistics(self.model, self._engine.grid.get_data_parallel_group())
        return self.step_output(sums, normalizer, grad_norm, applied)

    def broadcast(self, batches: list[Batch]) -> list[Batch]:
        """What the first stage has read. An image that only one stage can read would set their rows apart."""
        group = self._engine.grid.get_pipe_parallel_group()
        texts = [replace(batch, pixel_values=None, image_features=None) for batch in batches]
        dist.broadcast_object_list(texts, src=self.data_rank, group=group)  # the first stage's rank is its data rank
        return batches if self.stage.is_first else texts

    def evaluate_sums(self, batch: Batch) -> tuple[list[float], int]:
        self.model.eval()
        self._run.start([batch])
        self._engine.eval_batch(
            _nothing(), compute_loss=False, reduce_output=None, bcast_loss=False, num_micro_batches=1
        )
        normalizer = self.objective.normalizer(batch) if self.stage.is_last else 0
        *sums, total = sum_over_ranks([*self._run.sums.read(), float(normalizer)])
        return sums, int(total)

    def sum_over_data_ranks(self, values: list[float]) -> list[float]:
        return sum_over_ranks(values, self._engine.grid.get_data_parallel_group())

    def gather_from_data_ranks(self, value: T) -> list[T]:
        return gather_objects(value)[: self.num_data_ranks]  # ranks of the first stage; the others give the same

    def whole_model(self) -> AbstractContextManager[VisionLanguageModel | None]:
        return nullcontext()

    def weight_fragments(self) -> Iterator[Fragment]:
        yield from self._with_copies(zero_fragments(self.parameters, self._zero))
        if self.data_rank == 0:
            names = dict(self.parameters)
            for name, tensor in self.stage.trained_weights().items():
                if name not in names:  # statistics, which every data rank holds whole
                    yield Fragment.whole(name, tensor)

    def optimizer_fragments(self) -> Iterator[Fragment]:
        yield from self._with_copies(zero_fragments(self.parameters, self._zero, states=True))

    def load(self, folder: Path) -> None:
        super().load(folder)
        reader = FragmentReader(state_files(folder, "weights"))  # each rank holds its stage whole beside its part of it
        load_stage_weights(self.stage, LazyTensors(reader.shapes, reader.whole), str(folder))

    def _with_copies(self, fragments: Iterator[Fragment]) -> Iterator[Fragment]:
        """A tied head is a copy of the embedding on the first stage, under its name."""
        tied = self.stage.tied_name
        for part in fragments:
            if tied is not None and part.name.startswith(self.stage.tied_head):
                yield replace(part, name=tied + part.name.removeprefix(self.stage.tied_head), is_copy=True)
            else:
                yield part


def _nothing() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of [1], what DeepSpeed takes for data; `StageRun` has the micro-batches."""
    return itertools.repeat((torch.zeros(1), torch.zeros(1)))
