"""Decoders for one row at a time: with a cache of transformers, if it proves right for this model, else without any.

Each class of transformers has its own idea of a cache: one for keys and values, one of the class's own, a state that
is returned. Some read a prompt in pieces wrongly (Mamba's convolution forgets the piece before). What works is tried
once, on a few tokens. Letters: Q new tokens, D width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm.logs import warn
from vlm.models.decoders import accepts, find_decoder
from vlm.models.vlm import VisionLanguageModel

_NAMES = ("cache", "past_key_values", "cache_params", "state")  # of the argument, over transformers' versions
# Tokens of the trial: a prompt in three pieces, then one by one. The third is shorter than a convolution's kernel.
_PIECES = (5, 4, 2, 1, 1, 1)


@dataclass(frozen=True)
class CacheUse:
    """How a class of transformers takes its cache."""

    name: str  # of the argument, and of what it returns
    makes_own: bool  # given none, it makes one of its own kind
    one_by_one: bool  # only the first piece of a prompt may be longer than a token


def build_row_decoder(model: VisionLanguageModel) -> RowByRowDecoder | PlainDecoder:
    """The fastest of these that computes what the model computes without a cache."""
    parameters = inspect.signature(find_decoder(model.llm).forward).parameters
    name = next((name for name in _NAMES if name in parameters), None)
    for one_by_one in (False, True):
        for makes_own in (False, True):
            if name is not None:
                decoder = RowByRowDecoder(model, CacheUse(name, makes_own, one_by_one))
                if _is_right(model, decoder):
                    return decoder
    warn(
        f"model type {model.llm.config.model_type}: no cache was found that gives the same as none, so every new token "
        "runs the whole row again, which is slow"
    )
    return PlainDecoder(model)


@torch.no_grad()
def _is_right(model: VisionLanguageModel, decoder: RowByRowDecoder) -> bool:
    weight = model.llm.get_input_embeddings().weight
    ids = torch.arange(1, sum(_PIECES) + 1, device=weight.device) * 7 % (weight.shape[0] - 1)
    embeddings = model.embed(ids[None])
    plain, cached = PlainDecoder(model), []
    expected, start = [], 0
    try:
        for count in _PIECES:
            piece = embeddings[:, start : start + count]
            cached.append(decoder.prefill(piece, 0, start))
            expected.append(plain.prefill(piece, 0, start))
            start += count
    except Exception:  # transformers' classes differ in how they refuse a cache of another kind
        return False
    finally:
        decoder.release()
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(cached, expected, strict=True)]
    # The median: one token may be sent to another expert by rounding. A wrong cache differs by 0.1 and more in each.
    return sorted(errors[1:])[len(errors) // 2] < (0.02 if weight.dtype == torch.float32 else 0.1)


class RowByRowDecoder:
    """A cache of transformers and a forward for each row: for families that `BatchedDecoder` does not know."""

    rows_at_once = False

    def __init__(self, model: VisionLanguageModel, use: CacheUse) -> None:
        self._decoder = find_decoder(model.llm)
        self._config = model.llm.config.get_text_config(decoder=True)
        self._takes_positions = accepts(self._decoder, "position_ids")
        self._use = use
        self._caches: dict[int, Any] = {}
        self._lengths: dict[int, int] = {}

    @property
    def num_reserved(self) -> int:
        return sum(list(self._lengths.values()))  # a copy: metrics read it meanwhile

    def reserve(self, num_slots: int, num_cells: int, max_tokens: int) -> None:
        """Caches of transformers grow by themselves."""

    def prefill(self, embeddings: Tensor, slot: int, start: int) -> Tensor:
        """[1, Q, D] -> [1, D]; see `Decoder`."""
        from transformers import DynamicCache

        if start == 0:
            self._caches[slot] = None if self._use.makes_own else DynamicCache(config=self._config)
        pieces = embeddings.split(1, dim=1) if self._use.one_by_one and start else (embeddings,)
        hidden_state = embeddings.new_zeros(0)
        for piece in pieces:
            hidden_state = self._forward(piece, slot, start)
            start += piece.shape[1]
        self._lengths[slot] = start
        return hidden_state

    def _forward(self, embeddings: Tensor, slot: int, start: int) -> Tensor:
        """[1, Q, D] at positions from `start` -> hidden state of the last token, [1, D]."""
        arguments: dict[str, Any] = {self._use.name: self._caches[slot]}
        if self._takes_positions:
            end = start + embeddings.shape[1]
            arguments["position_ids"] = torch.arange(start, end, device=embeddings.device)[None]
        output = self._decoder(inputs_embeds=embeddings, use_cache=True, **arguments)
        if self._use.makes_own:
            self._caches[slot] = next(output[name] for name in _NAMES if output.get(name) is not None)
        last: Tensor = output.last_hidden_state[:, -1]
        return last

    def decode(self, embeddings: Tensor, lengths: list[int], first_slot: int = 0) -> Tensor:
        """[1, 1, D] -> [1, D]; see `Decoder`."""
        assert len(lengths) == 1
        return self.prefill(embeddings, first_slot, lengths[0])

    def copy(self, source: int, target: int, num_tokens: int) -> bool:
        return False  # not every cache of transformers can be cut back to its first tokens

    def clear(self, slot: int) -> None:
        self._caches.pop(slot, None)
        self._lengths.pop(slot, None)

    def move(self, source: int, target: int) -> None:
        self._caches[target] = self._caches.pop(source)
        self._lengths[target] = self._lengths.pop(source)

    def release(self) -> None:
        self._caches, self._lengths = {}, {}


class PlainDecoder:
    """No cache: every forward reads the row from its start. Right for every decoder, and slow."""

    rows_at_once = False

    def __init__(self, model: VisionLanguageModel) -> None:
        self._model = model
        self._rows: dict[int, Tensor] = {}  # embeddings of all tokens so far, [1, n, D]

    @property
    def num_reserved(self) -> int:
        return sum(row.shape[1] for row in list(self._rows.values()))

    def reserve(self, num_slots: int, num_cells: int, max_tokens: int) -> None:
        """Rows grow by themselves."""

    def prefill(self, embeddings: Tensor, slot: int, start: int) -> Tensor:
        """[1, Q, D] -> [1, D]; see `Decoder`."""
        row = embeddings if start == 0 else torch.cat([self._rows[slot][:, :start], embeddings], dim=1)
        self._rows[slot] = row
        positions = torch.arange(row.shape[1], device=row.device)[None]
        return self._model.decode(row, positions)[:, -1]

    def decode(self, embeddings: Tensor, lengths: list[int], first_slot: int = 0) -> Tensor:
        """[1, 1, D] -> [1, D]; see `Decoder`."""
        assert len(lengths) == 1
        return self.prefill(embeddings, first_slot, lengths[0])

    def copy(self, source: int, target: int, num_tokens: int) -> bool:
        self._rows[target] = self._rows[source][:, :num_tokens]
        return True

    def clear(self, slot: int) -> None:
        self._rows.pop(slot, None)

    def move(self, source: int, target: int) -> None:
        self._rows[target] = self._rows.pop(source)

    def release(self) -> None:
        self._rows = {}
