"""EngineConfig -> which process does what, and the engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from vlm.batch import microbatches_per_step
from vlm.errors import ConfigError
from vlm.launch import launched_rank, launched_size, local_rank
from vlm.models.partition import full_shape
from vlm.models.pipeline_build import Stage
from vlm.models.vlm import VisionLanguageModel
from vlm.objectives.base import Objective
from vlm.train.config import EngineConfig, TrainConfig
from vlm.train.engines.base import LossModule
from vlm.train.engines.deepspeed_settings import deepspeed_settings
from vlm.train.engines.kinds import kind_of_launch
from vlm.train.engines.local import LocalEngine
from vlm.train.engines.pipeline import PipelineEngine
from vlm.train.engines.torch_engine import TorchEngine
from vlm.train.engines.zero import Partitioner, ZeroEngine
from vlm.train.optim import build_optimizer
from vlm.train.scaling import LossScale

if TYPE_CHECKING:
    from vlm.train.engines.base import Engine


@dataclass(frozen=True)
class Place:
    """What this process is in the launch."""

    kind: str  # local, ddp, zero, fsdp, pipeline
    data_rank: int = 0  # which share of the data it takes
    num_data_ranks: int = 1
    stage: int = 0  # which part of the model it holds
    num_stages: int = 1
    zero_stage: int = 0

    @property
    def needs_group(self) -> bool:
        """Whether the engine wants a process group even for one process."""
        return self.kind in ("zero", "fsdp", "pipeline")

    def describe(self) -> str:
        kind = f"zero stage {self.zero_stage}" if self.kind == "zero" else self.kind
        stages = f", {self.num_stages} stages" if self.num_stages > 1 else ""
        return f"{kind}, {self.num_data_ranks * self.num_stages} processes{stages}"


def place_in_launch(config: EngineConfig) -> Place:
    """What this process is, from the launcher's environment variables; asks no other process.

    Raises:
        ConfigError: the engine does not fit the number of processes.
    """
    rank, size = launched_rank(), launched_size()
    kind = kind_of_launch(config, size)
    if kind != "pipeline":
        return Place(kind, rank, size, zero_stage=config.stage if kind == "zero" else 0)
    num_data_ranks = size // config.num_stages
    return Place(kind, rank % num_data_ranks, num_data_ranks, rank // num_data_ranks, config.num_stages)


def choose_device(name: str) -> torch.device:
    """auto: this process's GPU if there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "engine.device is cuda, but torch sees no GPU here. Set engine.device to auto or cpu, "
            "or install a CUDA build of torch; `vlm doctor` shows what is installed"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank()} of this machine has no GPU of its own: there are {torch.cuda.device_count()}. "
            "Start as many processes as GPUs, or set engine.device to cpu"
        )
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())


def block_spreader(
    config: EngineConfig, train: TrainConfig, place: Place, device: torch.device
) -> Callable[[nn.Module], object] | None:
    """What spreads a decoder block over the ranks while the model is loaded. None: every rank holds whole blocks."""
    if place.kind == "fsdp":
        from vlm.train.engines.fsdp import shard_block  # late: torch's part of it takes 1 s

        return partial(shard_block, device=device)
    if place.kind == "zero" and config.stage == 3:
        steps = microbatches_per_step(train.global_batch_size, train.micro_batch_size, place.num_data_ranks)
        settings = deepspeed_settings(config, train, accumulation_steps=steps, num_data_ranks=place.num_data_ranks)
        return Partitioner(settings, device)
    return None


def build_engine(
    config: EngineConfig,
    train: TrainConfig,
    model: VisionLanguageModel | Stage,
    objective: Objective,
    place: Place,
    *,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
    accumulation_steps: int,
    loss_scale: LossScale | None = None,
) -> Engine:
    """The engine that `place` says, over a model that is built, frozen and has its starting weights.

    Args:
        model: whole, or this rank's stage for a pipeline.
        accumulation_steps: micro-batches per optimizer step on this data rank.
        loss_scale: for float16; None scales nothing.
    """
    if isinstance(model, Stage):
        settings = deepspeed_settings(
            config, train, accumulation_steps=accumulation_steps, num_data_ranks=place.num_data_ranks, stage=1,
            num_trained=sum(math.prod(model.shapes[name]) for name in model.trained),
        )  # fmt: skip
        return PipelineEngine(
            model, objective, train, settings,
            num_data_ranks=place.num_data_ranks, device=device, autocast_dtype=autocast_dtype, loss_scale=loss_scale,
        )  # fmt: skip
    module = LossModule(model, objective, autocast_dtype)
    if place.kind == "zero" and config.stage == 0:  # for what a user's JSON contradicts; DeepSpeed itself has no part
        deepspeed_settings(config, train, accumulation_steps=accumulation_steps, num_data_ranks=place.num_data_ranks)
    if place.kind == "zero" and config.stage > 0:
        settings = deepspeed_settings(
            config, train, accumulation_steps=accumulation_steps, num_data_ranks=place.num_data_ranks,
            num_trained=sum(math.prod(full_shape(p)) for p in model.parameters() if p.requires_grad),
        )  # fmt: skip
        return ZeroEngine(module, build_optimizer(model, train), settings, device=device, loss_scale=loss_scale)
    engine_class: type[TorchEngine] = LocalEngine
    if place.kind == "fsdp":
        from vlm.train.engines.fsdp import FullyShardedEngine, shard

        shard(module, device)
        engine_class = FullyShardedEngine
    return engine_class(
        module,
        build_optimizer(model, train),
        device=device,
        max_grad_norm=train.max_grad_norm,
        loss_scale=loss_scale,
    )
