"""The kinds of engines, one class and one line of `ENGINES` each. Imports no torch.

What the memory estimate counts on one device, with N data ranks:

| | weights | gradients | optimizer state |
|---|---|---|---|
| local, zero stage 0 | all | all | all |
| ddp | all | all, and the reduction buckets, which are as large | all |
| zero 1 | all | all | 1/N |
| zero 2 | all | 1/N | 1/N |
| zero 3 | 1/N | 1/N | 1/N |
| fsdp | 1/N | 1/N; all while they are summed over several micro-batches | 1/N |
| pipeline (ZeRO-1 on each stage) | the stage's | the stage's | the stage's 1/N |

Weights in 4 or 8 bits are whole in every process, under zero 3 and fsdp too.

DeepSpeed updates a float32 copy of its part of the weights, so its optimizer state has 12 bytes a trained parameter
instead of AdamW's 8. 8-bit moments have about 2 instead of these 8 (`train.optimizer`); paged ones are counted in the
host's memory, where a full GPU keeps them. DeepSpeed's reduction bucket exists from the first backward of a step on
(stage 1), during each backward (stage 2), or always (stage 3).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

from pydantic import Field, PositiveInt, model_validator

from vlm.batch import microbatches_per_step
from vlm.errors import ConfigError
from vlm.schema import PathText
from vlm.train.config import TrainConfig
from vlm.train.engines.kind import (
    ADAM,
    FLOAT32,
    EngineInputs,
    EngineKind,
    ModelPart,
    Place,
    States,
    Variant,
    adam_bytes,
    num_trained,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vlm.train.engines.base import Engine

REDUCE_BUCKET = 500_000_000  # elements; at most this, and no more than what trains: one float32 buffer exists
MAX_LIVE = 1_000_000_000  # its default stage3_max_live_parameters: gathered weights that it keeps at most


@final
class Auto(EngineKind):
    """What the number of processes decides."""

    kind: Literal["auto"] = "auto"
    """`local` in one process, `ddp` in several."""

    proven_as = ()

    def of_launch(self, num_processes: int) -> EngineKind:
        kind = Local if num_processes == 1 else Ddp
        found = kind(device=self.device, timeout_seconds=self.timeout_seconds)
        found._unused.update(self.unused)
        return found

    def build(self, inputs: EngineInputs) -> Engine:
        return self.of_launch(inputs.place.num_processes).build(inputs)


@final
class Local(EngineKind):
    kind: Literal["local"] = "local"
    """One process."""

    proven_as = ("",)

    def build(self, inputs: EngineInputs) -> Engine:
        return _local_engine(inputs)

    def why_not_processes(self, num_processes: int) -> str | None:
        if num_processes == 1:
            return None
        return (
            f"engine.kind is local, which is one process, but there are {num_processes}. Set engine.kind to auto, ddp, "
            "zero, fsdp or pipeline, or start one process (`vlm plan`: --gpus 1)"
        )


@final
class Ddp(EngineKind):
    kind: Literal["ddp"] = "ddp"
    """torch's DistributedDataParallel."""

    def build(self, inputs: EngineInputs) -> Engine:
        return _local_engine(inputs)


class OverDeepSpeed(EngineKind):
    """What the kinds over DeepSpeed have in common."""

    offload: tuple[Literal["optimizer", "parameters"], ...] = ()
    """What waits in host memory."""
    deepspeed: PathText | None = None
    """A DeepSpeed JSON file whose settings are added; what it contradicts in this config is an error."""

    needs_group = True

    @property
    def keeps_optimizer_on_host(self) -> bool:
        return "optimizer" in self.offload

    def settings(self, inputs: EngineInputs, stage: int, num_trained: int = 0) -> dict[str, Any]:
        """What deepspeed.initialize gets. Raises ConfigError for what the user's JSON contradicts."""
        return self.settings_of(inputs.train, inputs.accumulation_steps, inputs.place, stage, num_trained)

    def settings_of(
        self, train: TrainConfig, accumulation_steps: int, place: Place, stage: int, num_trained: int = 0
    ) -> dict[str, Any]:
        from vlm.train.engines.deepspeed_settings import deepspeed_settings

        return deepspeed_settings(
            train, self.deepspeed, stage=stage, offload=self.offload, accumulation_steps=accumulation_steps,
            num_data_ranks=place.num_data_ranks, num_trained=num_trained,
        )  # fmt: skip

    def bucket(self, trained: int) -> int:
        """Bytes of the reduction bucket."""
        return FLOAT32 * self.setting("reduce_bucket_size", min(REDUCE_BUCKET, trained))

    def setting(self, key: str, default: int) -> int:
        """A value of the user's JSON, or DeepSpeed's default."""
        if self.deepspeed is None or not Path(self.deepspeed).is_file():
            return default
        values: Any = json.loads(Path(self.deepspeed).read_text(encoding="utf-8"))
        found = values.get("zero_optimization", {}).get(key, default) if isinstance(values, dict) else default
        return int(found) if isinstance(found, int | float) else default

    def states_of_stage_1(
        self, parts: Sequence[ModelPart], train: TrainConfig, num_data_ranks: int, on_host: bool
    ) -> States:
        weights, trained, share = sum(part.weights for part in parts), num_trained(parts), 1 / num_data_ranks
        bucket = self.bucket(trained)
        optimizer, reduced = int((adam_bytes(train) + FLOAT32) * trained * share), int(FLOAT32 * trained * share)
        if on_host:
            return States(weights, 0, bucket, host=optimizer + reduced)
        return States(weights, optimizer, bucket, reduced=reduced)


@final
class Zero(OverDeepSpeed):
    kind: Literal["zero"] = "zero"
    """DeepSpeed's ZeRO."""
    stage: Annotated[int, Field(ge=0, le=3)] = 2
    """What is spread over the ranks. 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too."""
    offload: tuple[Literal["optimizer", "parameters"], ...] = ()
    """What waits in host memory; parameters need stage 3."""

    numbered_by = "stage"
    proven_as = ("0*2", "1*2", "2*2", "3*2")

    @model_validator(mode="after")
    def _consistent(self) -> Zero:
        if self.offload and self.stage == 0:
            raise ValueError("offload: stage 0 spreads nothing and offloads nothing; set stage to 1, 2 or 3")
        if "parameters" in self.offload and self.stage < 3:
            raise ValueError(f"offload: parameters can be offloaded at stage 3 only, stage is {self.stage}")
        return self

    @classmethod
    def variants(cls, now: EngineKind) -> list[Variant]:
        found = []
        for stage, offload, where, order in (
            (2, (), "", 1),
            (2, ("optimizer",), ", optimizer on the host", 2),
            (3, (), "", 4),
            (3, ("optimizer",), ", optimizer on the host", 5),
            (3, ("optimizer", "parameters"), ", all on the host", 6),
        ):
            if isinstance(now, Zero) and (stage, offload) == (now.stage, now.offload):
                continue
            values = {"kind": "zero", "stage": stage}
            values |= {"offload": offload} if offload or now.written("offload") else {}
            found.append(Variant(f"zero stage {stage}{where}", values, order, helps_one_device=bool(offload)))
        return found

    @property
    def package(self) -> str | None:
        return "deepspeed" if self.stage > 0 else None

    @property
    def can_thaw(self) -> bool:
        return self.stage == 0

    @property
    def gathers(self) -> bool:
        return self.stage == 3

    def describe(self) -> str:
        return f"zero stage {self.stage}"

    def build(self, inputs: EngineInputs) -> Engine:
        from vlm.models.partition import full_shape
        from vlm.models.quantize import keep_packed_whole
        from vlm.train.engines.zero import ZeroEngine
        from vlm.train.optim import build_optimizer

        if self.stage == 0:  # `LocalEngine`; what a user's JSON contradicts is an error all the same
            self.settings(inputs, self.stage)
            return _local_engine(inputs)
        module = inputs.loss_module()
        if self.gathers:
            keep_packed_whole(module.model.llm)
        num_trained = sum(math.prod(full_shape(p)) for p in module.parameters() if p.requires_grad)
        settings = self.settings(inputs, self.stage, num_trained)
        optimizer = build_optimizer(module.model, inputs.train)
        return ZeroEngine(module, optimizer, settings, device=inputs.device, loss_scale=inputs.loss_scale)

    def block_spreader(
        self, train: TrainConfig, place: Place, device: torch.device
    ) -> Callable[[nn.Module], object] | None:
        if self.stage < 3:
            return None
        from vlm.train.engines.zero import Partitioner

        steps = microbatches_per_step(train.global_batch_size, train.micro_batch_size, place.num_data_ranks)
        return Partitioner(self.settings_of(train, steps, place, self.stage), device)

    def num_optimizer_shares(self, num_data_ranks: int) -> int:
        return num_data_ranks if self.stage > 0 else 1

    def resident_states(
        self, parts: Sequence[ModelPart], train: TrainConfig, num_data_ranks: int, accumulates: bool
    ) -> States:
        stage, offload = self.stage, self.offload
        if stage == 0:
            return super().resident_states(parts, train, num_data_ranks, accumulates)
        on_host = "optimizer" in offload
        if stage == 1:
            return self.states_of_stage_1(parts, train, num_data_ranks, on_host)
        weights, trained, share = sum(part.weights for part in parts), num_trained(parts), 1 / num_data_ranks
        bucket = self.bucket(trained)
        optimizer, kept = int((adam_bytes(train) + FLOAT32) * trained * share), 0.0 if on_host else share
        host = optimizer + int(FLOAT32 * trained * share) if on_host else 0
        optimizer = 0 if on_host else optimizer
        if stage == 2:
            return States(weights, optimizer, backward_buffers=bucket, host=host, gradient_share=kept)
        own = int(weights * share)
        live = self.setting("stage3_max_live_parameters", MAX_LIVE)
        gathered = min(weights, max(2 * max(part.weights for part in parts), _bytes_of(live, parts)))
        if "parameters" in offload:
            host, own = host + own, 0
        return States(own, optimizer, bucket + gathered, host=host, gradient_share=kept)


@final
class Fsdp(EngineKind):
    kind: Literal["fsdp"] = "fsdp"
    """torch's fully_shard."""

    needs_group = True

    @classmethod
    def variants(cls, now: EngineKind) -> list[Variant]:
        return [] if isinstance(now, Fsdp) else [Variant("fsdp", {"kind": "fsdp"}, 3)]

    @property
    def gathers(self) -> bool:
        return True

    def why_not_optimizer(self, train: TrainConfig, tied: str | None = None) -> str | None:
        if train.optimizer == "adamw":
            return None
        return (
            f"train.optimizer {train.optimizer} does not work with engine.kind fsdp, as bitsandbytes knows no "
            "sharded tensors; set engine.kind to zero, ddp or pipeline, or train.optimizer to adamw"
        )

    def build(self, inputs: EngineInputs) -> Engine:
        from vlm.models.quantize import keep_packed_whole
        from vlm.train.engines.fsdp import FullyShardedEngine, shard

        module = inputs.loss_module()
        keep_packed_whole(module.model.llm)
        shard(module, inputs.device)
        return FullyShardedEngine.over(module, inputs)

    def block_spreader(
        self, train: TrainConfig, place: Place, device: torch.device
    ) -> Callable[[nn.Module], object] | None:
        from vlm.train.engines.fsdp import shard_block

        return partial(shard_block, device=device)

    def num_optimizer_shares(self, num_data_ranks: int) -> int:
        return num_data_ranks

    def resident_states(
        self, parts: Sequence[ModelPart], train: TrainConfig, num_data_ranks: int, accumulates: bool
    ) -> States:
        """Each block is gathered for itself, the next one meanwhile; all the rest stays gathered through the step."""
        share = 1 / num_data_ranks
        of_blocks = [part for part in parts if part.name.startswith("block")]
        rest = sum(part.weights for part in parts if part not in of_blocks)
        block = max((part.weights for part in of_blocks), default=0)
        gradients = max((part.gradients for part in of_blocks), default=0)
        return States(
            int(sum(part.weights for part in parts) * share),
            int(ADAM * num_trained(parts) * share),
            0 if num_data_ranks == 1 else rest + 2 * block + gradients,
            gradient_share=1.0 if accumulates else share,
        )


@final
class Pipeline(OverDeepSpeed):
    """The processes of a stage share its optimizer state (ZeRO-1)."""

    kind: Literal["pipeline"] = "pipeline"
    """The model cut into stages, over DeepSpeed."""
    num_stages: PositiveInt = 2
    """Parts that the model is cut into; the other ranks repeat them for more data."""
    cuts: tuple[PositiveInt, ...] | None = None
    """Index of the first layer of each stage but the first; null balances by cost."""

    has_stages = True
    numbered_by = "num_stages"
    proven_as = ("2*2", "2*4", "3*3", "4*4")

    @model_validator(mode="after")
    def _consistent(self) -> Pipeline:
        if self.cuts is not None and (
            len(self.cuts) != self.num_stages - 1 or list(self.cuts) != sorted(set(self.cuts))
        ):
            raise ValueError(
                f"cuts: {list(self.cuts)} must be {self.num_stages - 1} rising numbers for num_stages {self.num_stages}"
            )
        return self

    @classmethod
    def variants(cls, now: EngineKind) -> list[Variant]:
        fewest = now.num_stages if isinstance(now, Pipeline) else 1
        cuts = {"cuts": None} if now.written("cuts") else {}
        return [
            Variant(f"pipeline of {stages}", {"kind": "pipeline", "num_stages": stages, **cuts}, 7)
            for stages in (2, 4, 8)
            if stages > fewest
        ]

    @property
    def package(self) -> str | None:
        return "deepspeed"

    @property
    def layers_at_cuts(self) -> tuple[int, ...]:
        return self.cuts or ()

    def why_not_processes(self, num_processes: int) -> str | None:
        stages = self.num_stages
        if num_processes % stages == 0:
            return None
        return (
            f"engine.num_stages {stages} does not divide {num_processes} processes. Start a multiple of it: "
            f"torchrun --nproc_per_node={stages} train_pipeline.py ... (`vlm plan`: --gpus {stages})"
        )

    def why_not_optimizer(self, train: TrainConfig, tied: str | None = None) -> str | None:
        if tied is None or not train.has_8bit_state:
            return None
        return (
            f"train.optimizer {train.optimizer} does not work with engine.kind pipeline for this model: its output "
            f"layer is its embedding ({tied}), and the copies on the first and the last stage would be rounded "
            "differently and drift apart. Set train.optimizer to adamw, or engine.kind to zero"
        )

    def place(self, rank: int, num_processes: int) -> Place:
        num_data_ranks = num_processes // self.num_stages
        return Place(rank % num_data_ranks, num_data_ranks, rank // num_data_ranks, self.num_stages)

    def build(self, inputs: EngineInputs) -> Engine:
        from vlm.models.pipeline_build import Stage
        from vlm.train.engines.pipeline import PipelineEngine

        stage = inputs.model
        assert isinstance(stage, Stage)
        tied = stage.tied_name if stage.tied_name in stage.trained else None
        if reason := self.why_not_optimizer(inputs.train, tied):
            raise ConfigError(reason)
        num_trained = sum(math.prod(stage.shapes[name]) for name in stage.trained)
        settings = self.settings(inputs, 1, num_trained)
        return PipelineEngine(
            stage, inputs.objective, inputs.train, settings,
            num_data_ranks=inputs.place.num_data_ranks, device=inputs.device, autocast_dtype=inputs.autocast_dtype,
            loss_scale=inputs.loss_scale,
        )  # fmt: skip

    def num_optimizer_shares(self, num_data_ranks: int) -> int:
        return num_data_ranks

    def resident_states(
        self, parts: Sequence[ModelPart], train: TrainConfig, num_data_ranks: int, accumulates: bool
    ) -> States:
        return self.states_of_stage_1(parts, train, num_data_ranks, on_host=False)


ENGINES: dict[str, type[EngineKind]] = {
    "auto": Auto, "local": Local, "ddp": Ddp, "zero": Zero, "fsdp": Fsdp, "pipeline": Pipeline,
}  # fmt: skip


def kind_of_launch(engine: EngineKind, num_processes: int) -> EngineKind:
    """`engine`, or what `auto` stands for.

    Raises:
        ConfigError: the engine does not fit the number of processes.
    """
    kind = engine.of_launch(num_processes)
    if reason := kind.why_not_processes(num_processes):
        raise ConfigError(reason).on_every_rank()
    return kind


def _local_engine(inputs: EngineInputs) -> Engine:
    from vlm.train.engines.local import LocalEngine

    return LocalEngine.over(inputs.loss_module(), inputs)


def _bytes_of(elements: int, parts: Sequence[ModelPart]) -> int:
    """Bytes of that many parameters of the blocks."""
    of_blocks = [part for part in parts if part.name.startswith("block")] or list(parts)
    is_mostly_trained = any(FLOAT32 * part.trained * 2 > part.weights for part in of_blocks)
    return elements * (FLOAT32 if is_mostly_trained else 2)
