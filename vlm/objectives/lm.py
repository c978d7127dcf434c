"""Language modelling: cross entropy of the supervised tokens. Serves pretraining and supervised finetuning alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from vlm.objectives.base import Head, LossOutput, ObjectiveConfig

if TYPE_CHECKING:
    from torch import Tensor

    from vlm.batch import Batch


class LanguageModeling:
    """See `Objective`. The loss is in nats, the normalizer counts supervised tokens."""

    metric_names: tuple[str, ...] = ()

    def normalizer(self, batch: Batch) -> int:
        return batch.num_supervised

    def num_head_calls(self, batch: Batch) -> int:
        from vlm.models.loss import count_chunks  # not above: `vlm --help` reads the section below

        return count_chunks(batch.num_supervised)

    def reads(self, batch: Batch) -> Tensor | None:
        from vlm.models.loss import predicts_supervised

        return predicts_supervised(batch.labels, batch.position_ids)

    def loss(self, hidden_states: Tensor, batch: Batch, head: Head) -> LossOutput:
        """hidden_states: [B, L, D]. The loss is a float32 scalar; see `Objective`."""
        from vlm.models.loss import chunked_cross_entropy

        loss = chunked_cross_entropy(
            hidden_states, batch.labels, head, min_chunks=head.min_calls, position_ids=batch.position_ids
        )
        return LossOutput(loss)


class LanguageModelingConfig(ObjectiveConfig):
    kind: Literal["lm"] = "lm"
    """Cross entropy of the tokens of replies."""

    def build(self) -> LanguageModeling:
        return LanguageModeling()
