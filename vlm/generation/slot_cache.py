"""Keys and values of many replies at once, and the decoder's forward over them.

Letters: R slots, C cells of a slot, B rows of one forward, Q new tokens of each row, K key heads, E head width, D model
width.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from vlm.compat import cache_argument
from vlm.models.decoders import find_decoder
from vlm.models.families import LENGTH_DEPENDENT_ROPE, family_of, llm_parts
from vlm.models.row_decoders import build_row_decoder
from vlm.models.vlm import VisionLanguageModel

CELLS = 64  # slots grow by multiples of this


class Decoder(Protocol):
    """Runs the decoder on some rows and keeps what their next tokens will look at.

    Slots in use are 0 .. n - 1. Cell p of a slot belongs to the token at position p.
    """

    rows_at_once: bool  # whether `decode` takes more than one row

    @property
    def num_reserved(self) -> int:
        """Tokens that memory is taken for."""

    def reserve(self, num_slots: int, num_cells: int, max_tokens: int) -> None:
        """Make room for `num_slots` times `num_cells` tokens, which are at most `max_tokens`; what these slots hold is
        kept. An error leaves all as it was."""

    def prefill(self, embeddings: Tensor, slot: int, start: int) -> Tensor:
        """[1, Q, D] at positions from `start`; returns the hidden state of the last one, [1, D]."""

    def decode(self, embeddings: Tensor, lengths: list[int], first_slot: int = 0) -> Tensor:
        """One new token for each of the slots from `first_slot`, [B, 1, D], at positions `lengths`; returns [B, D]."""

    def copy(self, source: int, target: int, num_tokens: int) -> bool:
        """Give an empty slot the first tokens of another. False if this decoder cannot: nothing is done."""

    def clear(self, slot: int) -> None:
        """Forget what a slot holds, if there is such a slot."""

    def move(self, source: int, target: int) -> None:
        """Put what one slot holds into another; `source` is empty afterwards."""

    def release(self) -> None:
        """Free all memory."""


def build_decoder(model: VisionLanguageModel) -> Decoder:
    """One forward for all rows where the model's family allows it, else one per row, with a cache that was tried."""
    config = model.llm.config
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {part.get("rope_type") for part in rope.values() if isinstance(part, dict)}
    if family_of(config).parts is not None and not kinds & LENGTH_DEPENDENT_ROPE:
        return BatchedDecoder(model)
    return build_row_decoder(model)


class SlotCache:
    """What attention layers write to and read from, in place of a cache of transformers.

    Each layer has keys and values [R, K, C, E]. A forward is told by `aim` which rows and cells it writes.
    """

    def __init__(self) -> None:
        self.num_slots = self.num_cells = 0
        self._layers: list[list[Tensor]] = []  # keys and values of each layer
        self._rows = slice(0, 0)
        self._positions = torch.zeros(0, 0, dtype=torch.long)
        self._end = 0  # cells that are read

    def aim(self, rows: slice, positions: Tensor, end: int) -> None:
        """Let the next forward write the cells `positions`, int64 [B, Q], of the slots `rows`, and read the first
        `end` cells."""
        self._rows, self._positions, self._end = rows, positions, end

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by every attention layer: [B, K, Q, E] new, [B, K, `end`, E] of all tokens so far."""
        while len(self._layers) <= layer_idx:
            self._layers.append([_cells(new, self.num_slots, self.num_cells) for new in (keys, values)])
        rows = torch.arange(self._rows.start, self._rows.stop, device=keys.device)[:, None]
        read = []
        for kept, new in zip(self._layers[layer_idx], (keys, values), strict=True):
            kept[rows, :, self._positions] = new.transpose(1, 2).to(kept.dtype)
            read.append(kept[self._rows, :, : self._end])
        return read[0], read[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cells before the ones that the next forward writes; unused where positions and masks are given."""
        return self._end - self._positions.shape[-1]

    @property
    def num_reserved(self) -> int:
        return self.num_slots * self.num_cells

    def reserve(self, num_slots: int, num_cells: int, max_tokens: int) -> None:
        """Slots and cells that were needed before are kept, as they may be needed again, unless that is too much."""
        needed = num_slots, round_up(num_cells)
        shape = max(needed[0], self.num_slots), max(needed[1], self.num_cells)
        if shape[0] * shape[1] > max_tokens:
            shape = needed
        if shape == (self.num_slots, self.num_cells):
            return
        layers = [[_cells(old, *shape) for old in layer] for layer in self._layers]  # all, before one is given up
        slots, cells = min(shape[0], self.num_slots), min(shape[1], self.num_cells)
        for layer, old_layer in zip(layers, self._layers, strict=True):
            for kept, old in zip(layer, old_layer, strict=True):
                kept[:slots, :, :cells] = old[:slots, :, :cells]
        self._layers = layers
        self.num_slots, self.num_cells = shape

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        for layer in self._layers:
            for kept in layer:
                kept[target, :, :num_tokens] = kept[source, :, :num_tokens]

    def clear(self, slot: int) -> None:
        # Zeroed and not only masked: 0 * NaN is NaN, so a broken reply would break the next one in its slot.
        for layer in self._layers:
            for kept in layer:
                kept[slot : slot + 1].zero_()

    def move(self, source: int, target: int) -> None:
        for layer in self._layers:
            for kept in layer:
                kept[target].copy_(kept[source])
                kept[source].zero_()

    def release(self) -> None:
        self._layers = []
        self.num_slots = self.num_cells = 0


class BatchedDecoder:
    """All rows in one forward. Rows of unequal length lie side by side, and masks hide what is behind a row's end."""

    rows_at_once = True

    def __init__(self, model: VisionLanguageModel) -> None:
        config = model.llm.config
        if "flash" in config._attn_implementation:
            model.llm.set_attn_implementation("sdpa")  # FlashAttention takes no mask of our own
        self._decoder = find_decoder(model.llm)
        self._is_eager = config._attn_implementation == "eager"
        self._window = getattr(config, "sliding_window", None)
        self._rule = llm_parts(config).window
        self._cache_argument = cache_argument(self._decoder.forward)
        self.cache = SlotCache()

    @property
    def num_reserved(self) -> int:
        return self.cache.num_reserved

    def reserve(self, num_slots: int, num_cells: int, max_tokens: int) -> None:
        self.cache.reserve(num_slots, num_cells, max_tokens)

    def prefill(self, embeddings: Tensor, slot: int, start: int) -> Tensor:
        """[1, Q, D] -> [1, D]; see `Decoder`."""
        end = start + embeddings.shape[1]
        positions = torch.arange(start, end, device=embeddings.device)[None]
        return self._forward(embeddings, positions, slice(slot, slot + 1), end)

    def decode(self, embeddings: Tensor, lengths: list[int], first_slot: int = 0) -> Tensor:
        """[B, 1, D] -> [B, D]; see `Decoder`."""
        positions = torch.tensor(lengths, device=embeddings.device)[:, None]
        return self._forward(embeddings, positions, slice(first_slot, first_slot + len(lengths)), max(lengths) + 1)

    def copy(self, source: int, target: int, num_tokens: int) -> bool:
        self.cache.copy(source, target, num_tokens)
        return True

    def clear(self, slot: int) -> None:
        self.cache.clear(slot)

    def move(self, source: int, target: int) -> None:
        self.cache.move(source, target)

    def release(self) -> None:
        self.cache.release()

    def _forward(self, embeddings: Tensor, positions: Tensor, rows: slice, end: int) -> Tensor:
        """[B, Q, D] at positions int64 [B, Q] -> hidden state of the last token of each row, [B, D]."""
        self.cache.aim(rows, positions, end)
        output = self._decoder(
            inputs_embeds=embeddings,
            position_ids=positions,
            attention_mask=self._masks(positions, end, embeddings.dtype),
            use_cache=True,
            **{self._cache_argument: self.cache},
        )
        return output.last_hidden_state[:, -1]

    def _masks(self, positions: Tensor, end: int, dtype: torch.dtype) -> Any:
        """[B, 1, Q, end]: the cells that tokens at positions int64 [B, Q] see, as this family's forward takes masks.

        bool, or in `dtype` for adding to the scores; a dict by kind of layer where the forward takes that.
        """
        cells = torch.arange(end, device=positions.device)
        full = cells <= positions[..., None]  # [B, Q, end]
        window = full if self._window is None else full & (cells > positions[..., None] - self._window)
        masks = {"full_attention": full[:, None], "sliding_attention": window[:, None]}
        if self._is_eager:  # adds the mask to the scores
            masks = {
                kind: torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
                    ~mask, torch.finfo(dtype).min
                )
                for kind, mask in masks.items()
            }
        if self._rule == "layer_types":
            return masks
        return masks["sliding_attention" if self._rule == "every block" else "full_attention"]


def round_up(num_tokens: int) -> int:
    """Cells of a slot for so many tokens.

    >>> round_up(1), round_up(64), round_up(65)
    (64, 64, 128)
    """
    return -(-num_tokens // CELLS) * CELLS


def bytes_per_token(model: VisionLanguageModel) -> int:
    """Memory of the keys and values of one token, in bytes.

    >>> from types import SimpleNamespace as N
    >>> shape = N(num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, hidden_size=576, head_dim=64)
    >>> bytes_per_token(N(llm=N(config=shape, dtype=torch.bfloat16)))
    23040
    """
    config = model.llm.config
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    all_heads = getattr(config, "num_attention_heads", None) or 1  # a recurrent state counts as one head: too much
    num_heads = getattr(config, "num_key_value_heads", None) or all_heads
    width = vars(config).get("head_dim") or config.hidden_size // all_heads
    return int(2 * config.num_hidden_layers * num_heads * width * model.llm.dtype.itemsize)


def _cells(like: Tensor, num_slots: int, num_cells: int) -> Tensor:
    """Zeros [R, K, C, E] for a layer whose new keys or values are [B, K, Q, E]."""
    return like.new_zeros(num_slots, like.shape[1], num_cells, like.shape[3])
