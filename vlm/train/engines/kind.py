"""What the program asks of a kind of engine before there is one. Imports no torch: the config asks too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import PositiveFloat

from vlm.schema import KindSection
from vlm.train.config import TrainConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vlm.models.config import ModelConfig
    from vlm.models.pipeline_build import Stage
    from vlm.models.vlm import VisionLanguageModel
    from vlm.objectives.base import Objective
    from vlm.train.engines.base import Engine, LossModule
    from vlm.train.scaling import LossScale

FLOAT32 = 4  # bytes
_WHOLE, _NO_STAGES = "local or ddp, or to zero with stage 1 or 2", "local, ddp, zero or fsdp"  # engines, for messages
ADAM = 8  # bytes per trained parameter: two float32 moments
ADAM_8BIT = 2 + 2 * FLOAT32 / 256  # two bytes, and two scales per block; tensors under 4,096 elements have ADAM


def adam_bytes(train: TrainConfig) -> float:
    """Bytes of AdamW's moments per trained parameter."""
    return ADAM_8BIT if train.has_8bit_state else ADAM


@dataclass(frozen=True)
class Place:
    """What a process is in its launch."""

    data_rank: int = 0  # which share of the data it takes
    num_data_ranks: int = 1
    stage: int = 0  # which part of the model it holds
    num_stages: int = 1

    @property
    def num_processes(self) -> int:
        return self.num_data_ranks * self.num_stages


@dataclass(frozen=True)
class EngineInputs:
    """What an engine is made of."""

    train: TrainConfig
    model: VisionLanguageModel | Stage  # built, frozen, with its starting weights; a stage where the kind has stages
    objective: Objective
    place: Place
    device: torch.device
    autocast_dtype: torch.dtype | None  # None computes in the weights' own dtype
    accumulation_steps: int  # micro-batches per optimizer step on this data rank
    loss_scale: LossScale | None = None  # for float16; None scales nothing

    def loss_module(self) -> LossModule:
        """The whole model and its loss, for an engine to wrap."""
        from vlm.models.vlm import VisionLanguageModel
        from vlm.train.engines.base import LossModule

        assert isinstance(self.model, VisionLanguageModel)
        return LossModule(self.model, self.objective, self.autocast_dtype)


class ModelPart(Protocol):
    """A piece of the model, as `vlm.plan.blocks` counts it."""

    @property
    def name(self) -> str:
        """Begins with "block" for a decoder block."""

    @property
    def weights(self) -> int:
        """Bytes."""

    @property
    def trained(self) -> int:
        """Parameters."""

    @property
    def gradients(self) -> int:
        """Bytes."""


@dataclass(frozen=True)
class States:
    """Weights, gradients and optimizer state on one device. Bytes, activations left out."""

    parameters: int
    optimizer: int
    buffers: int = 0
    backward_buffers: int = 0  # that exist during a backward only
    host: int = 0  # in the machine's memory instead
    gradient_share: float = 1.0  # of each gradient that stays on this device
    reduced: int = 0  # a rank's share of the gradients beside the whole ones, when the optimizer steps


@dataclass(frozen=True)
class Variant:
    """Settings with which `vlm plan` tries a kind of engine for a run that does not fit."""

    name: str
    values: dict[str, Any]  # of `engine:`
    order: int  # among those of all kinds: what slows a step least comes first
    helps_one_device: bool = False


class EngineKind(KindSection, ABC):
    """A way of spreading a model over processes: the section `engine` of the config, and what the program asks of it.

    What is answered here is right where every process holds the whole model and takes a share of the data of its own.
    """

    kind: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    timeout_seconds: PositiveFloat = 1800.0
    """Ranks that wait longer than this for another one stop with an error that names where each of them was."""

    needs_group: ClassVar[bool] = False  # a process group even for one process
    has_stages: ClassVar[bool] = False  # each process holds one stage of the model
    numbered_by: ClassVar[str | None] = None  # key of `engine:` that a digit stands for in names such as zero3
    proven_as: ClassVar[tuple[str, ...]] = ("*2",)  # digit and processes that scripts/prove_engines.py tries

    @abstractmethod
    def build(self, inputs: EngineInputs) -> Engine:
        """The engine. Imports what it needs here."""

    @classmethod
    def variants(cls, now: EngineKind) -> list[Variant]:
        """What `vlm plan` tries where a run with the engine `now` does not fit; nothing that it is already."""
        return []

    @property
    def package(self) -> str | None:
        """Python package that it needs beside torch; our extra that installs it has the same name."""
        return None

    @property
    def gathers(self) -> bool:
        """Whether ranks gather parts of the model from each other, and so must make the same calls."""
        return False

    @property
    def reads_whole(self) -> bool:
        """Whether each process keeps the base model whole, so that an adapter can be measured against its weights."""
        return not self.has_stages and not self.gathers

    @property
    def can_thaw(self) -> bool:
        """Whether a part's weights may stand still until a step, for `train.thaw`."""
        return not self.has_stages

    @property
    def keeps_optimizer_on_host(self) -> bool:
        """Whether the optimizer and its state are in the host's memory."""
        return False

    @property
    def layers_at_cuts(self) -> tuple[int, ...]:
        """Index of the first layer of each stage but the first, as the config has it; empty balances by cost."""
        return ()

    def of_launch(self, num_processes: int) -> EngineKind:
        """What it stands for in a launch of so many processes."""
        return self

    def describe(self) -> str:
        """For people: "zero stage 2"."""
        return self.kind

    def why_not_processes(self, num_processes: int) -> str | None:
        """Why a launch of so many processes does not fit; None where it does."""
        return None

    def why_not_optimizer(self, train: TrainConfig, tied: str | None = None) -> str | None:
        """Why it cannot work with `train.optimizer`; None where it can.

        Args:
            tied: name of an embedding that trains and is the output layer too; None if there is none.
        """
        return None

    def why_not_tuned(self, model: ModelConfig, train: TrainConfig) -> str | None:
        """Why it cannot train what `model` and `train` say in the way they say it; None where it can."""
        unknown = [part for part in train.thaw if part not in model.trainable]
        if unknown:
            return f"train.thaw names {unknown[0]}, which model.trainable does not; add it there, or drop it here"
        if train.thaw and len(train.thaw) == len(set(model.trainable)):
            return "train.thaw names every part of model.trainable, so nothing would train at first; leave one out"
        if train.thaw and not self.can_thaw:
            return f"train.thaw does not work with engine.kind {self.describe()}; set engine.kind to local, ddp or fsdp"
        if self.reads_whole:
            return None
        asked = [
            (name, engines)
            for name, is_set, engines in (
                ("model.lora.dora", model.lora is not None and model.lora.dora, _WHOLE),
                ("model.lora.modules_to_save", model.lora is not None and bool(model.lora.modules_to_save), _WHOLE),
                # engines that spread weights leave packed ones whole
                ("model.llm.quantization", model.llm.quantization is not None and self.has_stages, _NO_STAGES),
            )
            if is_set
        ]
        if not asked:
            return None
        name, engines = asked[0]
        return (
            f"{name} needs the whole base model in each process, and engine.kind {self.describe()} holds pieces of it; "
            f"set engine.kind to {engines}"
        )

    def place(self, rank: int, num_processes: int) -> Place:
        """What a process is in a launch that fits."""
        return Place(rank, num_processes)

    def block_spreader(
        self, train: TrainConfig, place: Place, device: torch.device
    ) -> Callable[[nn.Module], object] | None:
        """What spreads a decoder block over the ranks while it is loaded. None: every rank holds whole blocks."""
        return None

    def states(
        self, parts: Sequence[ModelPart], train: TrainConfig, num_data_ranks: int, accumulates: bool = True
    ) -> States:
        """What one device holds; for the memory estimate.

        Args:
            parts: of the model that this device works on.
            accumulates: a step has several micro-batches.
        """
        found = self.resident_states(parts, train, num_data_ranks, accumulates)
        if not train.is_paged or self.device == "cpu":
            return found
        paged = int(adam_bytes(train) * num_trained(parts) / self.num_optimizer_shares(num_data_ranks))
        return replace(found, optimizer=found.optimizer - paged, host=found.host + paged)

    def num_optimizer_shares(self, num_data_ranks: int) -> int:
        """Ranks that the optimizer state is spread over."""
        return 1

    def resident_states(
        self, parts: Sequence[ModelPart], train: TrainConfig, num_data_ranks: int, accumulates: bool
    ) -> States:
        """`states` as if that of the optimizer had no pages that may leave the device."""
        weights, trained = sum(part.weights for part in parts), num_trained(parts)
        optimizer = int(adam_bytes(train) * trained)
        if num_data_ranks == 1:
            return States(weights, optimizer)
        return States(weights, optimizer, FLOAT32 * trained, gradient_share=0.0)  # gradients lie in the buckets


def num_trained(parts: Sequence[ModelPart]) -> int:
    return sum(part.trained for part in parts)
