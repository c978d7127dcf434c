"""Switches of torch that hold for a whole run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vlm.train.config import TrainConfig


@contextmanager
def torch_switches(config: TrainConfig) -> Iterator[None]:
    """`train.tf32` and `train.deterministic`, for as long as the block lasts. Before anything computes on a GPU."""
    products, deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    if config.tf32:
        torch.set_float32_matmul_precision("high")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses; read at its first use
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = benchmark
