"""Cross entropy at supervised positions only, with the logits made in chunks for those alone.

Letters in shapes: B rows, L tokens, D LLM width, V vocabulary, S supervised positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlm.batch import IGNORE_INDEX, send

CHUNK_TOKENS = 1024  # supervised positions whose logits exist at a time
LogitsFn = Callable[[Tensor], Tensor]  # [S, D] -> [S, V]


def select_supervised(
    hidden_states: Tensor, labels: Tensor, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Pair each supervised label with the hidden state that predicts it.

    That is the one before; of the first token of a record without its beginning, the last one of the beginning that it
    shares, which so predicts several tokens.

    Args:
        hidden_states: [B, L, D], after the final norm.
        labels: int64 [B, L], not shifted. In host memory, nothing waits for the device.
        position_ids: int64 [B, L], as in `Batch`; None where no record shares its beginning.

    Returns:
        hidden states [S, D] and targets int64 [S], row by row, on the device of `hidden_states`.
    """
    row, before, at = find_supervised(labels, position_ids)
    row, before, targets = (send(each, hidden_states.device) for each in (row, before, labels[row, at]))
    return hidden_states[row, before], targets


def find_supervised(labels: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Of each supervised label the row, the place that predicts it and its own place, int64 [S] each; arguments as for
    `select_supervised`."""
    row, before = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    at = before + 1
    if position_ids is None:
        return row, before, at
    starts = torch.where(position_ids == 0, torch.arange(labels.shape[1], device=labels.device), 0).cummax(1).values
    position = position_ids[row, at]
    follows = position_ids[row, before] + 1 == position
    return row, torch.where(follows | (position == 0), before, starts[row, at] + position - 1), at


def predicts_supervised(labels: Tensor, position_ids: Tensor) -> Tensor:
    """bool [B, L]: the places whose hidden states the loss reads."""
    row, before, _ = find_supervised(labels, position_ids)
    return torch.zeros_like(labels, dtype=torch.bool).index_put((row, before), torch.ones_like(row, dtype=torch.bool))


def chunked_cross_entropy(
    hidden_states: Tensor,
    labels: Tensor,
    logits_fn: LogitsFn,
    chunk_tokens: int = CHUNK_TOKENS,
    min_chunks: int = 1,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Summed cross entropy of the supervised tokens, float32 scalar, in nats.

    At most `chunk_tokens` x V logits exist at any moment, in the backward pass too: beyond one chunk each chunk's
    logits are made again there. A batch without a supervised token gives 0 with a graph, through the head too, never
    NaN, so that every rank runs the same backward.

    Args:
        hidden_states: [B, L, D], after the final norm.
        labels: int64 [B, L], not shifted; IGNORE_INDEX where not supervised.
        logits_fn: the language model's head.
        chunk_tokens: supervised positions per chunk.
        min_chunks: use at least so many; the rest are empty. Ranks that share the head's weight must agree.
        position_ids: int64 [B, L], as in `Batch`; None where no record shares its beginning.
    """
    states, targets = select_supervised(hidden_states, labels, position_ids)
    return torch.stack(_in_chunks(_summed_loss, logits_fn, states, targets, chunk_tokens, min_chunks)).sum()


def log_probs_of_labels(
    hidden_states: Tensor,
    labels: Tensor,
    logits_fn: LogitsFn,
    chunk_tokens: int = CHUNK_TOKENS,
    min_chunks: int = 1,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Log-probability of each supervised token, float32 [S], in the order of `find_supervised`; arguments as for
    `chunked_cross_entropy`. Has a graph through the head where S is 0 too."""
    states, targets = select_supervised(hidden_states, labels, position_ids)
    return -torch.cat(_in_chunks(_losses, logits_fn, states, targets, chunk_tokens, min_chunks))


def _in_chunks(
    losses: Callable[[LogitsFn, Tensor, Tensor], Tensor],
    logits_fn: LogitsFn,
    states: Tensor,
    targets: Tensor,
    chunk_tokens: int,
    min_chunks: int,
) -> list[Tensor]:
    """What `losses` makes of each chunk of states [S, D] and targets [S]; beyond one chunk, made again in the backward
    pass."""
    num_chunks = max(min_chunks, count_chunks(len(targets), chunk_tokens))
    parts = [slice(i * chunk_tokens, (i + 1) * chunk_tokens) for i in range(num_chunks)]
    if num_chunks == 1 or not torch.is_grad_enabled():
        return [losses(logits_fn, states[part], targets[part]) for part in parts]
    return [checkpoint(losses, logits_fn, states[part], targets[part], use_reentrant=False) for part in parts]


def count_chunks(num_supervised: int, chunk_tokens: int = CHUNK_TOKENS) -> int:
    return max(1, -(-num_supervised // chunk_tokens))


def _summed_loss(logits_fn: LogitsFn, states: Tensor, targets: Tensor) -> Tensor:
    """States [s, D] and targets int64 [s] of one chunk -> float32 scalar, in nats."""
    return F.cross_entropy(logits_fn(states).float(), targets, reduction="sum")


def _losses(logits_fn: LogitsFn, states: Tensor, targets: Tensor) -> Tensor:
    """States [s, D] and targets int64 [s] of one chunk -> float32 [s], in nats."""
    return F.cross_entropy(logits_fn(states).float(), targets, reduction="none")
