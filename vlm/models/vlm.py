"""Vision encoder, projector and language model as one: images are spliced into the text at their placeholders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlm.batch import send
from vlm.models.decoders import accepts, find_decoder
from vlm.models.entry import find_embedding_factor
from vlm.models.families import packing_of
from vlm.models.head import find_logits_rule, head_logits
from vlm.models.last_block import can_cut, cut_last_block
from vlm.models.llm import recomputing_blocks
from vlm.models.lora import is_adapter
from vlm.models.projector import Projector
from vlm.models.recompute import RECOMPUTES
from vlm.models.segments import decode_one_by_one
from vlm.models.varlen import VARLEN, Decoder, decode_end_to_end
from vlm.models.vision import VisionEncoder
from vlm.precision import autocast

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class VisionLanguageModel(nn.Module):
    """Without `vision` and `projector` it is a plain language model; the same calls work.

    Args:
        image_token_id: marks placeholders in `input_ids`. It may lie beyond the embedding: it is never looked up.
        value_head: hidden states [..., D] -> [..., 1], of a model that scores replies.
    """

    def __init__(
        self,
        llm: PreTrainedModel,
        vision: VisionEncoder | None = None,
        projector: Projector | None = None,
        image_token_id: int | None = None,
        value_head: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.projector = projector
        self.llm: Any = llm  # a PreTrainedModel, whose methods are typed too loosely to check
        self.image_token_id = image_token_id
        self.value_head = value_head
        self.packing = packing_of(llm.config)
        self.logits_rule = find_logits_rule(llm)
        self.embedding_factor = find_embedding_factor(llm)
        self._cuts_last_block = can_cut(llm)
        if self._cuts_last_block:
            cut_last_block(llm)
        self.always_encode = False  # run encoder and projector without an image too, so that all ranks call the same

    def train(self, mode: bool = True) -> VisionLanguageModel:
        """Of a language model that does not train itself only adapters leave evaluation mode: no dropout, no noise."""
        super().train(mode)
        if mode and self.has_frozen_llm:
            blocks = set(map(id, recomputing_blocks(self.llm)))  # each asks for its own mode
            for name, module in self.llm.named_modules():
                module.training = is_adapter(name) or id(module) in blocks
        return self

    @property
    def has_frozen_llm(self) -> bool:
        """Whether nothing of the language model trains but adapters."""
        return not any(p.requires_grad and not is_adapter(name) for name, p in self.llm.named_parameters())

    @property
    def lets_records_share(self) -> bool:
        """Whether records that begin alike may stand once (`vlm.models.segments`), and gain by it."""
        return self.packing.by_positions and self.llm.config._attn_implementation == VARLEN

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, T, D]."""
        assert self.vision is not None
        assert self.projector is not None
        return self.projector(self.vision(pixel_values))

    def embed(
        self, input_ids: Tensor, image_features: Tensor | None = None, device: torch.device | None = None
    ) -> Tensor:
        """Token embeddings with image features at the placeholders.

        Args:
            input_ids: int64 [B, L].
            image_features: [N, T, D] of all images, or [tokens, D] of images of several sizes, in the order of their
                placeholders; None for text alone.
            device: that of the embedding, where `input_ids` are in host memory.

        Returns:
            [B, L, D] in the embedding's dtype.
        """
        if self.image_token_id is None:
            if image_features is not None:
                raise ValueError("images for a model without a placeholder token; give image_token_id")
            return self._words(send(input_ids, device or input_ids.device))
        is_image = input_ids == self.image_token_id
        embeddings = self._words(send(input_ids.masked_fill(is_image, 0), device or input_ids.device))
        features = embeddings.new_zeros(0, embeddings.shape[-1]) if image_features is None else image_features
        return splice_image_features(embeddings, features.flatten(0, -2), is_image)

    def _words(self, input_ids: Tensor) -> Tensor:
        """int64 [B, L] -> what the decoder is given for these tokens, [B, L, D]."""
        embeddings = self.llm.get_input_embeddings()(input_ids)
        return embeddings if self.embedding_factor == 1 else embeddings * self.embedding_factor

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        read: Tensor | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Hidden states [B, L, D] after the final norm, of packed rows.

        `input_ids`, `position_ids` and `read` decide what is computed: where they are in host memory, no forward waits
        for the device.

        Args:
            input_ids: int64 [B, L].
            position_ids: int64 [B, L]; they restart with every example, and nothing attends across a restart.
            pixel_values: [N, 3, S, S], in the order of the placeholders; None for text alone.
            image_features: [N, P, C], what the encoder yields for them, instead of `pixel_values`; empty for text alone
                where other rows bring features.
            read: bool [B, L], the tokens whose hidden states are read; others may be zeros. None for all.
            device: that computes; None: that of `input_ids`.
        """
        return self.decode(self.inputs_embeds(input_ids, pixel_values, image_features, device), position_ids, read)

    def inputs_embeds(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """What the decoder reads, [B, L, D]; arguments as `forward`."""
        features: Tensor | None = None
        zero: Tensor | None = None
        if image_features is not None and len(image_features):
            assert self.projector is not None
            features = self.projector(image_features)
        elif pixel_values is not None:
            features = self.encode_images(pixel_values)
        elif self.projector is not None and (self.training or self.always_encode):
            # before the embedding, as an image: ranks agree on the order
            zero = self._zero_from_a_dummy_image(is_encoded=image_features is not None)
        embeddings = self.embed(input_ids, features, device)
        return embeddings if zero is None else embeddings + zero

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., V], scaled or capped as the language model does."""
        return head_logits(self.llm, hidden_states, self.logits_rule)

    def values(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> float32 [...], by the value head, in float32 whatever the rest computes in."""
        assert self.value_head is not None
        with autocast(hidden_states.device.type, None):
            return self.value_head(hidden_states.float()).squeeze(-1)

    def decode(self, embeddings: Tensor, position_ids: Tensor, read: Tensor | None = None) -> Tensor:
        """Hidden states [B, L, D] after the final norm, of what `inputs_embeds` returns; positions as for `forward`."""
        longest = self.packing.longest
        if not self.packing.by_positions:
            return decode_one_by_one(self._decoder, embeddings, position_ids)
        # a longer record's rotations would be those of all records of its row
        if longest is not None and int(position_ids.max()) >= longest:
            return decode_one_by_one(self._decoder, embeddings, position_ids, most_tokens=1)
        return self.end_to_end(self._decoder, embeddings, position_ids, read if self._cuts_last_block else None)

    def end_to_end(
        self, forward: Decoder, hidden_states: Tensor, position_ids: Tensor, read: Tensor | None = None
    ) -> Tensor:
        """[B, L, D] -> [B, L, D] of packed rows, through a forward of the decoder or of some of its blocks, as its
        attention needs them; positions as for `forward`."""
        attention = self.llm.config._attn_implementation
        if attention == VARLEN:
            return decode_end_to_end(forward, hidden_states, position_ids, read)
        shape = hidden_states.shape
        position_ids = send(position_ids, hidden_states.device)
        if "flash" in attention:
            # FlashAttention sees restarts only in a batch of one row, else it lets examples look at each other without
            # a word (transformers' _is_packed_sequence). Rows start at position 0, so they may lie end to end.
            hidden_states, position_ids = hidden_states.flatten(0, 1)[None], position_ids.flatten()[None]
        return forward(hidden_states, position_ids, None).view(shape)

    def _decoder(self, embeddings: Tensor, position_ids: Tensor, layout: Tensor | None = None) -> Tensor:
        """[B, L, D] -> hidden states [B, L, D] after the final norm. layout: int64 [1, 1, S, 3], of varlen."""
        # Packing is honoured only without a mask of numbers and without a cache; with the default cache, examples of
        # a row see each other.
        decoder = find_decoder(self.llm)
        arguments: dict[str, Any] = {"position_ids": position_ids} if accepts(decoder, "position_ids") else {}
        output = decoder(inputs_embeds=embeddings, attention_mask=layout, use_cache=False, **arguments)
        return output.last_hidden_state

    def _zero_from_a_dummy_image(self, is_encoded: bool) -> Tensor | None:
        """Scalar 0, with a graph to every weight that would train if the batch had an image; None if none would.

        Args:
            is_encoded: whether images come as features.

        Ranks whose batch has none must still take part in the reduction of these gradients. The encoder computes it in
        evaluation mode: an image of zeros is none of the data, so batch norms must not keep its statistics.
        """
        assert self.projector is not None
        assert self.vision is not None
        reference = next(self.vision.parameters())
        if not is_encoded and (not self.vision.is_frozen or self.always_encode):
            with evaluating(self.vision):
                features = self.vision(self.vision.blank_image().float())
        elif self.always_encode or any(parameter.requires_grad for parameter in self.projector.parameters()):
            features = torch.zeros(1, self.vision.num_patches, self.vision.width, device=reference.device)
        else:
            return None
        return (self.projector(features).sum() * 0.0).to(reference.dtype)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and then the mode that it was in. Blocks that compute their activations again still do: under
    ZeRO-3 all ranks must gather weights equally often."""
    was_training = module.training
    module.eval()
    for block in module.modules():
        if getattr(block, RECOMPUTES, False):
            block.training = was_training
    try:
        yield
    finally:
        module.train(was_training)


def splice_image_features(inputs_embeds: Tensor, image_features: Tensor, is_image: Tensor) -> Tensor:
    """Write image features over the embeddings at the placeholders, the n-th feature at the n-th placeholder.

    Args:
        inputs_embeds: [B, L, D].
        image_features: [N * T, D], cast to the dtype of `inputs_embeds`.
        is_image: bool [B, L], true at placeholders; counted row by row. In host memory nothing waits for it.

    Raises:
        ValueError: more or fewer placeholders than features. Usually the template or a cut record put another number
            of placeholders than the projector yields per image.

    >>> mask = torch.tensor([[False, True, True]])
    >>> splice_image_features(torch.zeros(1, 3, 1), torch.tensor([[5.0], [6.0]]), mask).flatten().tolist()
    [0.0, 5.0, 6.0]
    """
    places = is_image.flatten().nonzero().flatten()
    if len(places) != len(image_features):
        raise ValueError(
            f"{len(places)} image placeholders, {len(image_features)} image features; placeholders per row: "
            f"{is_image.sum(1).tolist()}"
        )
    if not len(places):
        return inputs_embeds
    places = send(places, inputs_embeds.device)
    flat = inputs_embeds.flatten(0, 1).index_copy(0, places, image_features.to(inputs_embeds.dtype))
    return flat.view_as(inputs_embeds)
