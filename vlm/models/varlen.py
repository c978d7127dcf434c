"""Attention record by record inside a packed row: no mask of L x L, and no cost for what records do not see.

All rows of a micro-batch lie end to end without padding, and every record's queries meet its own keys only. What a
record is goes to each block in the place of its attention mask, as a tensor that transformers passes on as it is.

Letters: B rows, L tokens of a row, T tokens end to end, H heads, K heads of keys, d width of a head, S segments, l
tokens of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.batch import send
from vlm.compat import prepare
from vlm.errors import ConfigError
from vlm.logs import warn
from vlm.models.last_block import mark_read
from vlm.models.segments import Segment, find_segments

VARLEN = "varlen"  # the name that transformers knows it by

Decoder = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # [B, L, D], position_ids, layout or None -> [B, L, D]

Segments = tuple[tuple[int, int, int], ...]  # length, root and shared of each, see `Segment`
_LARGEST_ERROR = 0.02  # of the kernel for GPUs, relative to the largest value, in 16-bit formats


class EndToEnd(NamedTuple):
    """The tokens of a micro-batch that are no padding, as one row: on the device of the positions it was made from."""

    tokens: Tensor  # int64 [T], where each stands in the row-major order of all tokens
    position_ids: Tensor  # int64 [1, T]
    layout: Tensor  # int64 [1, 1, S, 3] on the CPU, see `encode_layout`


def lay_end_to_end(position_ids: Tensor) -> EndToEnd:
    """
    Args:
        position_ids: int64 [B, L], restarting with every record.
    """
    segments = find_segments(position_ids)
    positions = position_ids.flatten()
    index = torch.cat([torch.arange(segment.start, segment.start + segment.length) for segment in segments])
    index = index.to(position_ids.device)
    return EndToEnd(index, positions[index][None], encode_layout(segments))


def decode_end_to_end(
    forward: Decoder, hidden_states: Tensor, position_ids: Tensor, read: Tensor | None = None
) -> Tensor:
    """Hidden states [B, L, D] of packed rows, from a forward that sees one row of records; zeros at padding.

    Args:
        forward: of a decoder or some of its blocks; [1, T, D], position_ids [1, T] and a layout -> [1, T, D].
        hidden_states: [B, L, D] that enter it.
        position_ids: int64 [B, L], restarting with every record. In host memory, nothing waits for the device.
        read: bool [B, L], tokens whose states are wanted, of a forward that leaves out the others; zeros stand there.
            Where `position_ids` are.
    """
    row, device = lay_end_to_end(position_ids), hidden_states.device
    flat = hidden_states.flatten(0, 1)
    tokens = places = send(row.tokens, device)
    if read is not None:
        index = read.flatten()[row.tokens].nonzero().flatten()
        index = index if len(index) else index.new_zeros(1)  # a graph through the last block all the same
        mark_read(row.layout, send(index, device))
        places = send(row.tokens[index], device)
    is_whole = len(tokens) == len(flat)  # no padding
    out = forward((flat if is_whole else flat[tokens])[None], send(row.position_ids, device), row.layout)[0]
    if len(places) < len(flat):
        out = out.new_zeros(len(flat), out.shape[-1]).index_copy(0, places, out)
    return out.view(*position_ids.shape, -1)


def encode_layout(segments: Sequence[Segment]) -> Tensor:
    """Length, root and shared tokens of each segment, as what stands for an attention mask: int64 [1, 1, S, 3].

    Four dimensions, because transformers makes no mask of its own where it is given one with four.
    """
    return torch.tensor([segment[1:] for segment in segments]).view(1, 1, -1, 3)


def is_layout(attention_mask: Tensor | None) -> bool:
    """Whether it is from `encode_layout`, int64 [1, 1, S, 3]; masks are boolean or floating."""
    return attention_mask is not None and attention_mask.dtype == torch.int64 and attention_mask.ndim == 4


def varlen_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As transformers calls attention. With a mask, or none, that of its SDPA.

    Args:
        query: [1, H, T, d].
        key: [1, K, T, d], and `value` alike.
        attention_mask: from `encode_layout`.

    Returns:
        [1, T, H, d].

    Raises:
        ConfigError: the model has a window that it says in its mask alone, and a record is longer.
    """
    if not is_layout(attention_mask):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    assert attention_mask is not None
    segments = tuple(map(tuple, attention_mask[0, 0].tolist()))
    dropout, scaling, window = (kwargs.get(name) for name in ("dropout", "scaling", "sliding_window"))
    if "sliding_window" not in kwargs:
        _refuse_window_of_mask(module, segments)
    if query.is_cuda and not dropout and _kernel_serves(query):
        return _with_kernel(query, key, value, segments, scaling, window), None
    return _by_loop(query, key, value, segments, scaling, window, dropout or 0.0), None


def _refuse_window_of_mask(module: torch.nn.Module, segments: Segments) -> None:
    """Raises ConfigError: a record is longer than a window that stands in a mask alone. There is no mask here."""
    config = getattr(module, "config", None)
    window = getattr(config, "sliding_window", None)
    if window and (longest := max(length + shared for length, _, shared in segments)) > window:
        raise ConfigError(
            f"model type {getattr(config, 'model_type', '')}: a record of {longest} tokens, and its window of {window} "
            "is not told to its attention, so that all of them would be seen. Set model.llm.attention: sdpa"
        )


def _by_loop(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
    dropout: float = 0.0,
) -> Tensor:
    """A call for each segment, [1, T, H, d]. Splitting and joining cost a copy, in the backward pass too."""
    settings: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    queries, keys, values = (part.split([length for length, *_ in segments], dim=2) for part in (query, key, value))
    out = []
    for own, k, v, (_, root, shared) in zip(queries, keys, values, segments, strict=True):
        if shared:
            k = torch.cat([keys[root][:, :, :shared], k], dim=2)
            v = torch.cat([values[root][:, :, :shared], v], dim=2)
        out.append(_attend(own, k, v, window, settings).transpose(1, 2))
    return torch.cat(out, dim=1)


def _attend(query: Tensor, key: Tensor, value: Tensor, window: int | None, settings: dict[str, Any]) -> Tensor:
    """[1, H, l, d] of one segment; its queries are the last of its keys, [1, K, shared + l, d]."""
    length, seen = query.shape[2], key.shape[2]
    if length == seen and (window is None or length <= window):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **settings)
    mask = _mask(length, seen, min(window or seen, seen), query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **settings)


def _mask(length: int, seen: int, window: int, device: torch.device) -> Tensor:
    """bool [l, shared + l]: the last queries of a causal mask. Not kept: of long records it is large."""
    ones = torch.ones(length, seen, dtype=torch.bool, device=device)
    return ones.tril(seen - length).triu(seen - length + 1 - window)


def _with_kernel(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, window: int | None
) -> Tensor:
    """All segments in one call, [1, T, H, d]. 16-bit formats on a GPU only. It lets the last query see the last key."""
    from torch.nn.attention.varlen import varlen_attn

    lay = _lay(segments, query.device)
    query, key, value = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    if lay.keys is not None:
        key, value = key[lay.keys], value[lay.keys]
    out = varlen_attn(
        query, key, value, lay.query_ends, lay.key_ends, lay.most_queries, lay.most_keys,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out[None]


class _Lay(NamedTuple):
    """Segments as the kernel wants them."""

    query_ends: Tensor  # int32 [S + 1]: where each begins, and the last ends
    key_ends: Tensor  # int32 [S + 1]
    most_queries: int
    most_keys: int
    keys: Tensor | None  # int64: which keys the kernel reads, in order; None for all as they lie


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # a later forward may need it for its backward
def _lay(segments: Segments, device: torch.device) -> _Lay:
    """Every block of a forward asks for the same."""
    lengths = [length for length, *_ in segments]
    seen = [length + shared for length, _, shared in segments]
    ends, key_ends = (torch.tensor([0, *sizes]).cumsum(0) for sizes in (lengths, seen))
    keys = None
    if seen != lengths:
        starts = ends.tolist()
        parts = [
            torch.cat([torch.arange(shared) + starts[root], torch.arange(length) + start])
            for (length, root, shared), start in zip(segments, starts, strict=False)
        ]
        keys = send(torch.cat(parts), device)
    ends, key_ends = (send(each.int(), device) for each in (ends, key_ends))
    return _Lay(ends, key_ends, max(lengths), max(seen), keys)


def _kernel_serves(query: Tensor) -> bool:
    """Of queries [..., head width]."""
    is_16bit = query.dtype in (torch.bfloat16, torch.float16)
    return is_16bit and _kernel_is_right(query.device, query.dtype, query.shape[-1])


@lru_cache
@torch.inference_mode(False)  # with gradients, whichever forward is the first to ask
def _kernel_is_right(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether this GPU, this torch and this width give what SDPA gives record by record, in output and gradient.

    Tried once on a few tokens, since what the kernel takes depends on all three.
    """
    segments = ((3, 0, 0), (17, 0, 0), (5, 1, 9), (1, 0, 0))
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, heads, 26, head_dim, generator=generator) for heads in (4, 2, 2)]
    runs: tuple[Callable[..., Tensor], ...] = (_with_kernel, _by_loop)
    results = []
    try:
        for run in runs:
            leaves = [part.to(device, dtype).requires_grad_() for part in inputs]
            out = run(*leaves, segments, None, 8)
            results.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)])
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
    else:
        errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True)]
        if max(errors) < _LARGEST_ERROR:
            return True
        reason = f"it differs from SDPA by {max(errors):.1g} of the largest value"
    warn(f"attention: torch's varlen kernel is not used for heads of {head_dim} in {dtype}, which is slower: {reason}")
    return False


def register() -> None:
    """Make the name known to transformers. Without a layout it is SDPA, with SDPA's masks."""
    prepare()
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, sdpa_mask)
