"""The model as a row of layers that can be cut into stages, each on its own process.

    layer 0            inputs: encoder, projector, token embedding    Batch -> hidden states [B, L, D]
    layers 1 to n      the decoder's blocks                           [B, L, D] -> [B, L, D]
    layer n + 1        output: last norm, and the head for the loss   [B, L, D] -> [B, L, D]

Every stage has the micro-batch itself, so that between stages only hidden states travel. All layers in a row compute
what `VisionLanguageModel` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vlm.batch import Batch
from vlm.models.families import BlockInputs, block_inputs, has_window, llm_parts
from vlm.models.vlm import VisionLanguageModel


class PipelineLayer(nn.Module):
    """Interface of the three kinds of layers. `prefixes`: canonical names of its weights begin with one of them."""

    prefixes: tuple[str, ...]


class InputsLayer(PipelineLayer):
    """A micro-batch -> token embeddings with projected images at their placeholders."""

    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__()
        parts = llm_parts(model.llm.config)
        self.vision = model.vision
        self.projector = model.projector
        self.embed = model.llm.get_submodule(parts.embed)
        self.prefixes = ("vision.", "projector.", f"llm.{parts.embed}.")
        self._model = (model,)  # in a tuple: the rest of the model is no part of this layer

    def forward(self, batch: Batch) -> Tensor:
        """[B, L, D] in the embedding's dtype."""
        (model,) = self._model
        return model.inputs_embeds(batch.input_ids, batch.pixel_values, batch.image_features, batch.device)


class BlockLayer(PipelineLayer):
    """One block of the decoder. Checkpointing of its activations is a setting of the block itself."""

    def __init__(self, model: VisionLanguageModel, index: int) -> None:
        super().__init__()
        blocks = llm_parts(model.llm.config).blocks
        self.block = model.llm.get_submodule(f"{blocks}.{index}")
        self.has_window = has_window(model.llm.config, index)
        self.prefixes = (f"llm.{blocks}.{index}.", f"llm.lora.{blocks}.{index}.")

    def forward(self, hidden_states: Tensor, inputs: BlockInputs) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        return self.block(
            hidden_states,
            attention_mask=inputs.window_mask if self.has_window else inputs.full_mask,
            position_ids=inputs.position_ids,
            use_cache=False,
            position_embeddings=inputs.position_embeddings,
        )


class OutputLayer(PipelineLayer):
    """The norm, and the heads, which the last stage's loss calls through `model.logits` and `model.values`."""

    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__()
        parts = llm_parts(model.llm.config)
        self.norm = model.llm.get_submodule(parts.norm)
        self.head = model.llm.get_submodule(parts.head)
        self.value_head = model.value_head
        self.prefixes = (f"llm.{parts.norm}.", f"llm.{parts.head}.", "value_head.")

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D], what the head reads."""
        return self.norm(hidden_states)


def num_layers(llm: Any) -> int:
    """The decoder's blocks, the inputs and the output. Raises ConfigError for a family that is not known."""
    return len(llm.get_submodule(llm_parts(llm.config).blocks)) + 2


def pipeline_layers(model: VisionLanguageModel, first: int = 0, stop: int | None = None) -> list[PipelineLayer]:
    """Layers `first` to `stop`, that one left out; modules are the model's own, not copies.

    Raises:
        ConfigError: the language model's family is not known.
    """
    last = num_layers(model.llm) - 1
    return [
        InputsLayer(model) if index == 0 else OutputLayer(model) if index == last else BlockLayer(model, index - 1)
        for index in range(first, last + 1 if stop is None else stop)
    ]


def run_layers(
    model: VisionLanguageModel, layers: Sequence[PipelineLayer], batch: Batch, hidden_states: Tensor | None = None
) -> Tensor:
    """One stage's forward.

    Args:
        layers: some of `pipeline_layers(model)`, in order.
        batch: the micro-batch, on this stage's device.
        hidden_states: [B, L, D] from the stage before; None for the first.

    Returns:
        hidden states [B, L, D]; from the last stage after the final norm.
    """
    blocks = [layer for layer in layers if isinstance(layer, BlockLayer)]
    for layer in layers:
        if isinstance(layer, InputsLayer):
            hidden_states = layer(batch)
        elif isinstance(layer, OutputLayer):
            hidden_states = layer(hidden_states)
        elif layer is blocks[0]:
            assert hidden_states is not None
            hidden_states = _run_blocks(model, blocks, batch.position_ids, hidden_states)
    assert hidden_states is not None
    return hidden_states


def _run_blocks(
    model: VisionLanguageModel, blocks: Sequence[BlockLayer], position_ids: Tensor, hidden_states: Tensor
) -> Tensor:
    """[B, L, D] -> [B, L, D]."""

    def run(hidden_states: Tensor, position_ids: Tensor, layout: Tensor | None = None) -> Tensor:
        windowed = {layer.has_window for layer in blocks}
        inputs = block_inputs(model.llm, windowed, hidden_states, position_ids, layout)
        for layer in blocks:
            hidden_states = layer(hidden_states, inputs)
        return hidden_states

    return model.end_to_end(run, hidden_states, position_ids)
