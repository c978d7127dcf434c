"""Weights, gradients and optimizer state on one device, and how each engine spreads them over N data ranks.

| | weights | gradients | optimizer state |
|---|---|---|---|
| local, zero stage 0 | all | all | all |
| ddp | all | all, and the reduction buckets, which are as large | all |
| zero 1 | all | all | 1/N |
| zero 2 | all | 1/N | 1/N |
| zero 3 | 1/N | 1/N | 1/N |
| fsdp | 1/N | 1/N; all while they are summed over several micro-batches | 1/N |
| pipeline (ZeRO-1 on each stage) | the stage's | the stage's | the stage's 1/N |

DeepSpeed updates a float32 copy of its part of the weights, so its optimizer state has 12 bytes a trained parameter
instead of AdamW's 8. 8-bit moments have about 2 instead of these 8 (`train.optimizer`); paged ones are counted in the
host's memory, where a full GPU keeps them. DeepSpeed's reduction bucket exists from the first backward of a step on
(stage 1), during each backward (stage 2), or always (stage 3).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm.config import RunConfig
from vlm.plan.blocks import Part
from vlm.plan.numerics import ADAM, FLOAT32, adam_bytes

REDUCE_BUCKET = 500_000_000  # elements; at most this, and no more than what trains: one float32 buffer exists
MAX_LIVE = 1_000_000_000  # its default stage3_max_live_parameters: gathered weights that it keeps at most


@dataclass(frozen=True)
class States:
    """Bytes on one device, activations left out."""

    parameters: int
    optimizer: int
    buffers: int = 0
    backward_buffers: int = 0  # that exist during a backward only
    host: int = 0
    gradient_share: float = 1.0  # of each gradient that stays on this device
    reduced: int = 0  # a rank's share of the gradients beside the whole ones, when the optimizer steps


def device_states(
    parts: Sequence[Part], config: RunConfig, kind: str, num_data_ranks: int, accumulates: bool = True
) -> States:
    """
    Args:
        parts: of the model that this device works on.
        kind: the engine, `auto` resolved.
        accumulates: a step has several micro-batches.
    """
    found = _all_on_the_device(parts, config, kind, num_data_ranks, accumulates)
    if not config.train.is_paged or config.engine.device == "cpu":
        return found
    is_whole = kind not in ("zero", "pipeline") or (kind == "zero" and config.engine.stage == 0)
    trained = sum(part.trained for part in parts)
    paged = int(adam_bytes(config.train) * trained / (1 if is_whole else num_data_ranks))
    return replace(found, optimizer=found.optimizer - paged, host=found.host + paged)


def _all_on_the_device(
    parts: Sequence[Part], config: RunConfig, kind: str, num_data_ranks: int, accumulates: bool
) -> States:
    """As if the state of the optimizer had no pages that may leave it."""
    weights, trained = sum(part.weights for part in parts), sum(part.trained for part in parts)
    share = 1 / num_data_ranks
    moments = adam_bytes(config.train)
    if kind == "fsdp":
        return _fsdp(parts, weights, trained, 1.0 if accumulates else share, share)
    bucket = FLOAT32 * _setting(config, "reduce_bucket_size", min(REDUCE_BUCKET, trained))
    if kind == "pipeline" or (kind == "zero" and config.engine.stage == 1):
        on_host = kind == "zero" and "optimizer" in config.engine.offload
        optimizer, reduced = int((moments + FLOAT32) * trained * share), int(FLOAT32 * trained * share)
        if on_host:
            return States(weights, 0, bucket, host=optimizer + reduced)
        return States(weights, optimizer, bucket, reduced=reduced)
    if kind == "zero" and config.engine.stage > 1:
        return _zero(parts, config, weights, trained, share, bucket)
    if num_data_ranks == 1:
        return States(weights, int(moments * trained))
    return States(weights, int(moments * trained), FLOAT32 * trained, gradient_share=0.0)  # they lie in the buckets


def _zero(parts: Sequence[Part], config: RunConfig, weights: int, trained: int, share: float, bucket: int) -> States:
    """Stages 2 and 3."""
    offload = config.engine.offload
    on_host = "optimizer" in offload
    optimizer, kept = int((adam_bytes(config.train) + FLOAT32) * trained * share), 0.0 if on_host else share
    host = optimizer + int(FLOAT32 * trained * share) if on_host else 0
    optimizer = 0 if on_host else optimizer
    if config.engine.stage == 2:
        return States(weights, optimizer, backward_buffers=bucket, host=host, gradient_share=kept)
    own = int(weights * share)
    live = _setting(config, "stage3_max_live_parameters", MAX_LIVE)
    gathered = min(weights, max(2 * _largest(parts), _bytes_of(live, parts)))
    if "parameters" in offload:
        host, own = host + own, 0
    return States(own, optimizer, bucket + gathered, host=host, gradient_share=kept)


def _fsdp(parts: Sequence[Part], weights: int, trained: int, gradient_share: float, share: float) -> States:
    """Each block is gathered for itself, the next one meanwhile; all the rest stays gathered through the step."""
    of_blocks = [part for part in parts if part.name.startswith("block")]
    rest = sum(part.weights for part in parts if part not in of_blocks)
    block = max((part.weights for part in of_blocks), default=0)
    gradients = max((part.gradients for part in of_blocks), default=0)
    buffers = 0 if share == 1 else rest + 2 * block + gradients
    return States(int(weights * share), int(ADAM * trained * share), buffers, gradient_share=gradient_share)


def _largest(parts: Sequence[Part]) -> int:
    return max(part.weights for part in parts)


def _bytes_of(elements: int, parts: Sequence[Part]) -> int:
    """Bytes of that many parameters of the blocks."""
    of_blocks = [part for part in parts if part.name.startswith("block")] or list(parts)
    is_mostly_trained = any(FLOAT32 * part.trained * 2 > part.weights for part in of_blocks)
    return elements * (FLOAT32 if is_mostly_trained else 2)


def _setting(config: RunConfig, key: str, default: int) -> int:
    """A value of the user's own DeepSpeed JSON, or DeepSpeed's default."""
    if config.engine.deepspeed is None or not Path(config.engine.deepspeed).is_file():
        return default
    values: Any = json.loads(Path(config.engine.deepspeed).read_text(encoding="utf-8"))
    found = values.get("zero_optimization", {}).get(key, default) if isinstance(values, dict) else default
    return int(found) if isinstance(found, int | float) else default
