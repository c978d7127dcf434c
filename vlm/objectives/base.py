"""What every objective answers: how its loss is normalized, and the loss itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from vlm.schema import KindSection

if TYPE_CHECKING:
    from torch import Tensor

    from vlm.batch import Batch


@dataclass(frozen=True)
class Head:
    """The heads over the language model's hidden states, as an objective calls them.

    `min_calls` is how often every rank must call it for this batch: the most that any rank's objective has asked for.
    It is above 1 only where the ranks share the head's weight and would wait for each other; the engine sets it.
    """

    logits: Callable[[Tensor], Tensor]  # [S, D] -> [S, V]
    min_calls: int = 1
    values: Callable[[Tensor], Tensor] | None = None  # [S, D] -> float32 [S], of a model with a value head

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """[S, D] -> [S, V], in the dtype of the computation."""
        return self.logits(hidden_states)


@dataclass(frozen=True)
class LossOutput:
    """Sums over a batch, not means: the engine divides by the normalizer of the whole step."""

    loss: Tensor  # float32 scalar with a graph
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # float32 scalars without one, by name


class Objective(Protocol):
    """Hidden states of a batch -> a loss. Whole models and the last stage of a pipeline call the same object."""

    metric_names: tuple[str, ...]  # keys of every `LossOutput.metrics`; the log shows their sums over the normalizer

    def normalizer(self, batch: Batch) -> int:
        """What the summed loss is divided by: supervised tokens, or pairs. Known before any forward."""

    def num_head_calls(self, batch: Batch) -> int:
        """How often `loss` calls the head, at least 1. With a larger `head.min_calls` it calls it that often."""

    def reads(self, batch: Batch) -> Tensor | None:
        """bool [B, L]: the places whose hidden states `loss` reads; others need not be computed. None for all."""

    def loss(self, hidden_states: Tensor, batch: Batch, head: Head) -> LossOutput:
        """The summed loss of a batch. It has a graph through the head even where nothing is supervised, so that every
        rank runs the same backward.

        Args:
            hidden_states: [B, L, D], after the final norm.
        """


class Spreads(Protocol):
    """What an objective asks of the section `engine`."""

    @property
    def has_stages(self) -> bool: ...

    def describe(self) -> str: ...


class ObjectiveConfig(KindSection):
    """Base of the section `objective`; each kind has its own keys."""

    kind: str
    # what its records are
    reads: ClassVar[Literal["conversation", "preference", "judged", "verifiable"]] = "conversation"
    needs_reference: ClassVar[bool] = False  # whether `Batch.replies.reference` must be there
    needs_value_head: ClassVar[bool] = False  # whether its loss is of `Head.values`, alone or beside logits
    writes_replies: ClassVar[bool] = False  # whether the model writes the replies that it learns from
    counted: ClassVar[str] = "tokens"  # what its normalizer counts, for messages

    @property
    def scores(self) -> bool:
        """Whether the model that it makes scores replies and writes none."""
        return self.needs_value_head and not self.writes_replies

    @property
    def keeps_start(self) -> bool:
        """Whether what trains is kept as it is before the first step, to be compared with in every step."""
        return False

    @property
    def updates_per_step(self) -> int:
        """Updates of the weights in a step, all with the same batches."""
        return 1

    @property
    def numbers(self) -> frozenset[str]:
        """Names that its numbers have in metrics.jsonl."""
        return frozenset(self.build().metric_names)

    def measures(self, name: str) -> bool:
        """Whether held-out records are measured by a number of metrics.jsonl, such as "held_out_accuracy"."""
        return not self.writes_replies and name.removeprefix("held_out_") in self.build().metric_names

    def rows_of(self, max_length: int) -> int:
        """Rows of so many tokens that a row of the stream becomes, for the estimate of memory."""
        return 1

    def why_not(self, engine: Spreads, begins_blind: bool) -> str | None:
        """Why it cannot train so; None where it can.

        Args:
            begins_blind: the run starts with a projector that was never trained.
        """
        if not self.writes_replies:
            return None
        if engine.has_stages:
            return (
                f"objective.kind {self.kind} writes replies with the whole model, and engine.kind {engine.describe()} "
                "holds each layer in one process; set engine.kind to ddp, zero or fsdp"
            )
        if self.keeps_start and begins_blind:
            return (
                f"objective.kind {self.kind} with kl above 0 holds the model to the one that the run starts from, "
                "whose projector is random without init_from; name the export of a run that trained it, or set "
                "objective.kl to 0"
            )
        return None

    def why_not_parts(self, trainable: Collection[str], asks: bool) -> str | None:
        """Why it cannot train these parts of a model; None where it can.

        Args:
            trainable: of the model.
            asks: whether the model shall answer questions while it trains.
        """
        has_head = "value_head" in trainable
        if self.needs_value_head and not has_head:
            return f"objective.kind {self.kind} trains a value head: add value_head to model.trainable"
        if has_head and not self.needs_value_head:
            return (
                f"model.trainable names value_head, which objective.kind {self.kind} does not train; remove it there, "
                "or set objective.kind to reward or ppo"
            )
        if self.scores and asks:
            return (
                f"objective.kind {self.kind} trains a model that scores replies and writes none; set train.samples and "
                "train.eval_tasks to []"
            )
        return None

    def build(self) -> Objective:
        raise NotImplementedError
