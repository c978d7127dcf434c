"""What one forward holds, and in which number formats: rows of a micro-batch, bytes of each kind of tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlm.config import RunConfig
from vlm.precision import fast_precision
from vlm.train.engines.kind import FLOAT32


@dataclass(frozen=True)
class Workload:
    """A micro-batch."""

    rows: int  # B
    length: int  # L, tokens per row
    num_images: int  # N, in all rows
    supervised: int  # S, positions with a label, in all rows
    has_restarts: bool = True  # several examples in a row, or padding: attention then needs a mask

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def full_rows(config: RunConfig, tokens_per_image: int, rows: int | None = None) -> Workload:
    """The largest micro-batch of a config: every row full, every token supervised, as many images as fit."""
    rows, length = rows or config.train.micro_batch_size, config.data.max_length
    images = min(config.data.max_images, length // tokens_per_image) if tokens_per_image else 0
    return Workload(rows, length, rows * images, rows * length)


@dataclass(frozen=True)
class Numerics:
    """Bytes per number, as `train.precision` sets them (docs/training.md)."""

    frozen: int  # of a weight that does not train; one that does is float32
    compute: int  # of what linear layers read and write
    residual: int  # of the hidden states between decoder blocks: the embedding's own format
    attention: str  # "varlen", "sdpa", "flash_attention_2" or "eager"
    on_gpu: bool

    @property
    def is_autocast(self) -> bool:
        """Float32 weights are copied to 16 bits for the computation."""
        return self.compute < FLOAT32

    def copied(self, is_trained: bool) -> bool:
        """Whether autocast makes a 16-bit copy of a weight."""
        return self.is_autocast and (is_trained or self.frozen == FLOAT32)


def read_numerics(config: RunConfig, has_flash_attention: bool, takes_varlen: bool) -> Numerics:
    """
    Args:
        has_flash_attention: what `attention: auto` takes on the GPU.
        takes_varlen: what it takes else, in place of SDPA with masks.
    """
    precision: str = config.train.precision
    attention: str = config.model.llm.attention
    on_gpu = config.engine.device != "cpu"
    if precision == "auto":
        precision = "bf16" if on_gpu else fast_precision(torch.device("cpu"))
    frozen = 2 if precision in ("bf16", "fp16") else FLOAT32
    if attention == "auto":
        plain = "varlen" if takes_varlen else "sdpa"
        attention = "flash_attention_2" if on_gpu and has_flash_attention else plain
    return Numerics(
        frozen=frozen,
        compute=FLOAT32 if precision == "fp32" else 2,
        residual=FLOAT32 if "llm" in config.model.trainable and "llm" not in config.model.partial else frozen,
        attention=attention,
        on_gpu=on_gpu,
    )
