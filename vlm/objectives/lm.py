"""Language modelling: cross entropy of the supervised tokens. Serves pretraining and supervised finetuning alike."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from vlm.batch import Batch
from vlm.models.loss import chunked_cross_entropy, count_chunks
from vlm.models.vlm import VisionLanguageModel


class Objective(Protocol):
    """A loss and the count that it is divided by."""

    def weight(self, batch: Batch) -> int:
        """What the loss is averaged over: supervised tokens, or pairs. Read from the labels, before any forward."""

    def num_chunks(self, batch: Batch) -> int:
        """Pieces in which the loss of the batch is computed."""

    def loss(self, model: VisionLanguageModel, batch: Batch, num_chunks: int = 1) -> Tensor:
        """Summed loss of the batch, float32 scalar with a graph, in at least `num_chunks` pieces."""


class LanguageModeling:
    def weight(self, batch: Batch) -> int:
        return batch.num_supervised

    def num_chunks(self, batch: Batch) -> int:
        return count_chunks(batch.num_supervised)

    def loss(self, model: VisionLanguageModel, batch: Batch, num_chunks: int = 1) -> Tensor:
        hidden_states = model(batch.input_ids, batch.position_ids, batch.pixel_values, batch.image_features)
        return chunked_cross_entropy(hidden_states, batch.labels, model.logits, num_chunks=num_chunks)
