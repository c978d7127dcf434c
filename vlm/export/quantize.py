"""8- and 4-bit weights for talking: the language model's linear layers, after adapters were merged into them.

Quantizing first and merging then would round twice; here the sum is rounded once.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import nn

from vlm.errors import ConfigError, MissingPackageError

BITS = (4, 8)


def check_bits(bits: int | None, device: torch.device) -> None:
    """
    Raises:
        MissingPackageError: bitsandbytes is not installed.
        ConfigError: another number of bits, or a device that bitsandbytes does not compute on.
    """
    if bits is None:
        return
    if bits not in BITS:
        raise ConfigError(f"--bits {bits}: bitsandbytes stores weights in 4 or 8 bits; leave the flag out for all 16")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackageError("bitsandbytes", f"--bits {bits}", "quant")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--bits {bits}: only on cuda and cpu, not on {device}. Leave --bits or --device out")


def quantize_linears(llm: Any, bits: int, compute_dtype: torch.dtype, device: torch.device) -> int:
    """Replace the linear layers of the decoder blocks, one after the other; embedding and head stay as they are.

    Args:
        bits: 8 (LLM.int8, Dettmers et al. 2022, arXiv:2208.07339) or 4 (NF4, Dettmers et al. 2023, arXiv:2305.14314).
        compute_dtype: what 4-bit weights are unpacked to.
        device: where the layers go; weights are rounded there.

    Returns:
        the number of layers replaced.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says on every start that a faster kernel is not there
    head = llm.get_output_embeddings()
    linears = [
        (name, module)
        for name, module in llm.named_modules()
        if type(module) is nn.Linear and module is not head and ".layers." in f".{name}"
        # bitsandbytes packs 4-bit weights for the CPU in such blocks, and fails on others; models in use have them
        if not (bits == 4 and device.type == "cpu" and (module.in_features % 64 or module.out_features % 32))
    ]
    for name, module in linears:
        parent, _, leaf = name.rpartition(".")
        setattr(llm.get_submodule(parent), leaf, _quantized(module, bits, compute_dtype).to(device))
    return len(linears)


def _quantized(linear: nn.Linear, bits: int, compute_dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    shape, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
    weight = linear.weight.data
    layer: Any
    if bits == 8:
        layer = bnb.nn.Linear8bitLt(*shape, bias=has_bias, has_fp16_weights=False, threshold=6.0, device="meta")
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(*shape, bias=has_bias, compute_dtype=compute_dtype, quant_type="nf4", device="meta")
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
        layer.weight.module = layer
    if has_bias:
        layer.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    return layer.requires_grad_(False).eval()
