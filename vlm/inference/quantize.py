"""8- and 4-bit weights for talking: the language model's linear layers, after adapters were merged into them.

Quantizing first and merging then would round twice; here the sum is rounded once.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vlm.errors import ConfigError, MissingPackageError
from vlm.logs import warn
from vlm.models.decoders import find_blocks, find_linears, is_transposed, linear_shape

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
    linears = find_linears(llm)
    fitting = {name: module for name, module in linears.items() if _fits(module, bits, device)}
    for name, module in fitting.items():
        parent, _, leaf = name.rpartition(".")
        setattr(llm.get_submodule(parent), leaf, _quantized(module, bits, compute_dtype).to(device))
    _tell_the_rest(llm, bits, len(fitting), len(linears))
    return len(fitting)


def _fits(module: nn.Module, bits: int, device: torch.device) -> bool:
    """bitsandbytes packs 4-bit weights for the CPU in such blocks, and fails on others; models in use have them.

    A subclass of nn.Linear may compute something else with its weight (BitNet), and is left alone.
    """
    inputs, outputs = linear_shape(module)
    is_plain = type(module) is nn.Linear or is_transposed(module)
    return is_plain and not (bits == 4 and device.type == "cpu" and (inputs % 64 or outputs % 32))


def _tell_the_rest(llm: Any, bits: int, num_quantized: int, num_linears: int) -> None:
    """Say what keeps its precision, where that is more than norms and biases: a user asked for less memory."""
    blocks = find_blocks(llm).values()
    whole = sum(p.numel() for block in blocks for p in block.parameters() if p.is_floating_point() and p.dim() > 1)
    total = sum(math.prod(_shape_of(p)) for block in blocks for p in block.parameters() if p.dim() > 1)
    if num_quantized < num_linears or whole > total / 10:
        warn(
            f"--bits {bits}: {num_quantized} of {num_linears} linear layers of the blocks are quantized; "
            f"{whole / 1e6:.1f} M weights of the blocks stay as they are (experts in one tensor, convolutions, shapes "
            "that bitsandbytes does not pack)"
        )


def _shape_of(parameter: Any) -> tuple[int, ...]:
    state = getattr(parameter, "quant_state", None)  # of 4-bit weights, which lie packed
    return tuple(parameter.shape if state is None else state.shape)


@cache
def _linear_8bit() -> type:
    import bitsandbytes as bnb

    class Linear8bitRows(bnb.nn.Linear8bitLt):  # type: ignore[misc]
        """bitsandbytes flattens inputs of three dimensions only; multi-head latent attention has four."""

        def forward(self, inputs: Tensor) -> Tensor:
            """[..., in] -> [..., out]."""
            outputs: Tensor = super().forward(inputs.flatten(0, -2) if inputs.dim() > 3 else inputs)
            return outputs.view(*inputs.shape[:-1], -1)

    return Linear8bitRows


def _quantized(linear: Any, bits: int, compute_dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    shape, has_bias = linear_shape(linear), linear.bias is not None
    weight = linear.weight.data.T.contiguous() if is_transposed(linear) else linear.weight.data
    layer: Any
    if bits == 8:
        layer = _linear_8bit()(*shape, bias=has_bias, has_fp16_weights=False, threshold=6.0, device="meta")
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(*shape, bias=has_bias, compute_dtype=compute_dtype, quant_type="nf4", device="meta")
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
        layer.weight.module = layer
    if has_bias:
        layer.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    return layer.requires_grad_(False).eval()
