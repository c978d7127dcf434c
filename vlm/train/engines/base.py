"""The one interface between the loop and any way of spreading a model over processes, and what all ways share."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vlm.batch import Batch
from vlm.distributed import gather_objects, rank, sum_over_ranks
from vlm.errors import CheckpointError
from vlm.faults import fault
from vlm.models.trainable import canonical_name, trained_weights
from vlm.models.vlm import VisionLanguageModel
from vlm.objectives.base import Head, LossOutput, Objective
from vlm.precision import autocast
from vlm.train.bitsandbytes_adamw import QUANTIZED
from vlm.train.fragments import Fragment, FragmentReader, HostCopy, copy_to_host, state_files
from vlm.train.scaling import LossScale
from vlm.train.timing import StepTimer

T = TypeVar("T")
AnyObjective = TypeVar("AnyObjective", bound=Objective)


@dataclass(frozen=True)
class StepOutput:
    """What one optimizer step did."""

    loss: float  # the sum over all data ranks, divided by the normalizer; of language modelling nats per token
    grad_norm: float  # before clipping, over all trained weights
    applied: bool  # false when loss or gradient norm was not finite: the weights are as before
    loss_scale: float | None = None  # float16: the factor that this step's loss was multiplied by
    overflowed: bool = False  # float16: not applied because the factor was too large; the next one is smaller
    metrics: Mapping[str, float] = field(default_factory=dict)  # the objective's, divided as the loss
    told: Mapping[str, float] = field(default_factory=dict)  # what was found before the step; see `Roll`


class Engine(ABC):
    """One call of `train_step` is one optimizer step. Every rank makes the same calls in the same order.

    `timer` knows where the time of a step goes; subclasses tell it of "forward_backward" and "optimizer".

    Subclasses are final. What they yield as fragments are live views: writing into `values` changes their state.
    """

    data_rank: int  # which share of the stream this process takes; equal for all stages of one pipeline
    num_data_ranks: int
    holds_whole_model = False  # whether each process holds every weight whole, and `optimizer` the trained ones
    optimizer: torch.optim.Optimizer
    still: frozenset[str] = frozenset()  # parts that the next step leaves as they are, for `train.thaw`

    def __init__(
        self,
        model: VisionLanguageModel,
        objective: Objective,
        device: torch.device,
        autocast_dtype: torch.dtype | None,
        loss_scale: LossScale | None,
    ) -> None:
        self.model = model
        self.objective = objective
        self.device = device
        self.autocast_dtype = autocast_dtype  # of the computation; None computes in the weights' own dtype
        self.loss_scale = loss_scale
        self.parameters = list(trained_names(model))
        self.timer = StepTimer(device)
        if model.vision is not None:
            self.timer.watch(model.vision, "encode")
        self._used_factor: float | None = None

    @abstractmethod
    def train_step(self, microbatches: list[Batch], normalizer: float, lr_factor: float) -> StepOutput:
        """Forward and backward over the micro-batches, clip, update.

        Args:
            normalizer: divides the summed loss; of all micro-batches of all data ranks.
            lr_factor: each group's learning rate is its `initial_lr` times this.
        """

    @abstractmethod
    def evaluate_sums(self, batch: Batch) -> tuple[list[float], int]:
        """The loss and then the objective's metrics, in the order of their names, summed over all data ranks, and the
        normalizer; without a gradient."""

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """Summed loss and normalizer over all data ranks, without a gradient."""
        sums, normalizer = self.evaluate_sums(batch)
        return sums[0], normalizer

    @abstractmethod
    def whole_model(self) -> AbstractContextManager[VisionLanguageModel | None]:
        """The model to generate with; every rank makes the same calls. None where no rank has access to all of it."""

    @abstractmethod
    def weight_fragments(self) -> Iterable[Fragment]:
        """Everything that trains, in float32, with the statistics that belong to it."""

    @abstractmethod
    def optimizer_fragments(self) -> Iterable[Fragment]:
        """`<canonical name>/<state>` of every optimizer state, made with zeros where no step was done yet."""

    @property
    @abstractmethod
    def computes_loss(self) -> Any:
        """What holds the objective where the loss is computed: its attribute `objective`."""

    @contextmanager
    def using(self, objective: AnyObjective) -> Iterator[AnyObjective]:
        """Let `evaluate` compute another objective than the one that trains. Every rank does so."""
        trained, holder = self.objective, self.computes_loss
        self.objective = holder.objective = objective
        try:
            yield objective
        finally:
            self.objective = holder.objective = trained

    def copy_weights(self) -> list[Tensor]:
        """A copy of what trains, as this process holds it, for `exchange_weights`."""
        return [tensor.detach().clone() for tensor in self.weights_read()]

    @torch.no_grad()
    def exchange_weights(self, others: list[Tensor]) -> None:
        """What trains becomes `others`, and `others` what trained. Every rank calls it."""
        for tensor, other in zip(self.weights_read(), others, strict=True):
            now = tensor.clone()
            tensor.copy_(other)
            other.copy_(now)

    def weights_read(self) -> Iterable[Tensor]:
        """What trains, where forward passes read it; of each tensor what this process holds."""
        return trained_weights(self.model).values()

    @property
    def calls_alone(self) -> bool:
        """Whether a process may call the model's modules without the others."""
        return True

    def broadcast(self, batches: list[Batch]) -> list[Batch]:
        """The batches that all processes of one share of the data work on; each has read them by itself."""
        return batches

    def rehearse(
        self, microbatches: list[Batch], normalizer: float, look: Callable[[], T]
    ) -> tuple[float, float, T] | None:
        """A step without its update, in the mode that the model is in: loss, gradient norm, and what `look` returned
        while the gradients were there. Every rank gives the same batches. None where the engine cannot do without."""
        return None

    def sum_over_data_ranks(self, values: list[float]) -> list[float]:
        return sum_over_ranks(values)

    def gather_from_data_ranks(self, value: T) -> list[T]:
        """What each data rank gave, in order, on every rank."""
        return gather_objects(value)

    def start_step(self) -> float:
        """The factor of this step's loss: 1 where nothing is scaled."""
        self._used_factor = None if self.loss_scale is None else self.loss_scale.factor
        return self._used_factor or 1.0

    def step_output(self, sums: list[float], normalizer: float, grad_norm: float, applied: bool) -> StepOutput:
        """What `train_step` returns. Every rank calls it with the same numbers.

        Args:
            sums: loss and metrics, summed over all data ranks.
        """
        loss, *metrics = (value / normalizer for value in sums)
        overflowed = self.loss_scale is not None and self.loss_scale.settle(loss, grad_norm)
        named = dict(zip(self.objective.metric_names, metrics, strict=True))
        return StepOutput(loss, grad_norm, applied, self._used_factor, overflowed, named)

    def copies(self) -> Iterator[tuple[str, HostCopy]]:
        """This rank's share of "weights" and of "optimizer", each copied when it is asked for. Communicates nothing."""
        yield "weights", copy_to_host(self.weight_fragments())
        yield "optimizer", copy_to_host(self._all_optimizer_fragments())

    def num_copied_bytes(self) -> int:
        """Host memory that this rank's `copies` take together."""
        parts = itertools.chain(self.weight_fragments(), self._all_optimizer_fragments())
        return sum(part.values.nbytes for part in parts if not part.is_copy)

    def save(self, folder: Path) -> None:
        """Write this rank's share of weights/ and optimizer/ below `folder`. Communicates nothing."""
        write_copies(self.copies(), folder)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read what any engine on any number of ranks wrote. Raises CheckpointError for each tensor that is missing."""
        for part, own in (("weights", self.weight_fragments()), ("optimizer", self._all_optimizer_fragments())):
            reader = FragmentReader(state_files(folder, part))
            problems, is_quantized = [], False
            for fragment in own:
                found = reader.shapes.get(fragment.name)
                if found != fragment.shape:
                    problems.append(f"  {fragment.name}: {_shape(found)} -> {_shape(fragment.shape)}")
                    is_quantized |= fragment.name.rpartition("/")[2] in QUANTIZED
                elif not problems:
                    fragment.values.copy_(reader.read(fragment.name, fragment.start, fragment.values.numel()))
            if problems:
                raise CheckpointError(
                    f"{folder / part} does not fit this {'launch' if is_quantized else 'model'} (file -> now):\n"
                    + "\n".join(problems[:20])
                    + ("\n" + (_OTHER_BLOCKS if is_quantized else _OTHER_PARTS))
                )

    def _all_optimizer_fragments(self) -> Iterator[Fragment]:
        yield from self.optimizer_fragments()
        if self.loss_scale is not None:
            yield Fragment.whole("loss_scale", self.loss_scale.state)


def write_copies(copies: Iterable[tuple[str, HostCopy]], folder: Path) -> None:
    """Each into the folder of its name below `folder`. Raises OSError when the disk refuses."""
    for name, copy in copies:
        copy.write(folder / name, rank())
        fault("save:shard")


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

    def forward(self, batch: Batch, min_head_calls: int = 1) -> tuple[Tensor, Tensor]:
        """Float32 scalar with a graph, and the metrics [M] in the order of their names; see `LossOutput`.

        Args:
            min_head_calls: see `Head`.
        """
        device = batch.device or batch.input_ids.device
        with autocast(device.type, self.autocast_dtype):
            hidden_states = self.model(
                batch.input_ids,
                batch.position_ids,
                batch.pixel_values,
                batch.image_features,
                self.objective.reads(batch),
                device,
            )
            head = Head(self.model.logits, min_head_calls, self.model.values)
            output = self.objective.loss(hidden_states, batch, head)
        return spoil(output.loss), stack_metrics(output, self.objective.metric_names)

    def begin(self) -> None:
        """Computes nothing. `fully_shard` must have seen a call of the whole before one of its blocks."""


def stack_metrics(output: LossOutput, names: Sequence[str]) -> Tensor:
    """[M] float32, without a graph."""
    if not names:
        return output.loss.detach().new_zeros(0)
    return torch.stack([output.metrics[name].detach().float() for name in names])


class Sums:
    """Loss and metrics summed over the micro-batches of a step. They stay on the device until `read`."""

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self.values = torch.zeros(1 + len(objective.metric_names), dtype=torch.float64, device=device)

    def add(self, loss: Tensor, metrics: Tensor) -> None:
        """loss: scalar; metrics: [M], as `stack_metrics` orders them."""
        self.values += torch.cat([loss.detach().view(1), metrics])

    def read(self) -> list[float]:
        """The loss, then the metrics. Waits for the device."""
        return self.values.tolist()


def poison(loss: Tensor) -> Tensor:
    """The scalar loss, or NaN if it is not finite: an infinite loss may have finite gradients, of NaN some are NaN."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)


def spoil(loss: Tensor) -> Tensor:
    """A scalar loss as VLM_FAULT asks for: one that is not finite, or one that is with gradients that are not."""
    if fault("loss") == "nan":
        return loss * float("nan")
    if loss.requires_grad and fault("gradient") == "nan":
        loss.register_hook(lambda gradient: gradient * float("nan"))
    return loss


_OTHER_PARTS = (
    "Usually the config's trainable parts changed since the checkpoint: restore them, or start in another output_dir "
    "with init_from"
)
_OTHER_BLOCKS = (
    "The blocks of 8-bit optimizer state belong to the engine and the number of processes that made them: resume with "
    "those, or export this run and start in another output_dir with init_from"
)


def adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """The optimizer's state of one parameter, made with zeros as AdamW's first step would if there is none yet.

    Tensors of the parameter's shape [...] and scalars; 8-bit state has scales of blocks too, `absmax1` and `absmax2`.
    """
    if hasattr(optimizer, "saved_state"):  # vlm.train.bitsandbytes_adamw
        return optimizer.saved_state(parameter)
    state = optimizer.state[parameter]
    if not state:
        on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


def shared_adam_state(optimizer: torch.optim.Optimizer) -> Iterator[Fragment]:
    """What 8-bit state of all parameters has in common. Ask after `adam_state`."""
    if hasattr(optimizer, "shared_state"):
        for key, value in optimizer.shared_state().items():
            yield Fragment.whole(f"all/{key}", value)


def trained_names(model: VisionLanguageModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Canonical name and parameter of everything that trains."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield canonical_name(name), parameter


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
