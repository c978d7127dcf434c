"""8- and 4-bit weights of the language model's linear layers, by bitsandbytes: to talk, and to train adapters beside.

Formats: nf4 and fp4 (Dettmers et al. 2023, arXiv:2305.14314), int8 (LLM.int8, Dettmers et al. 2022, arXiv:2208.07339).
"""

from __future__ import annotations

import importlib.util
import logging
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vlm.errors import MissingPackageError
from vlm.logs import warn
from vlm.models.config import QuantizationConfig
from vlm.models.decoders import find_blocks, find_linears, is_transposed, linear_shape


def require_bitsandbytes(what: str) -> None:
    """Raises MissingPackageError where it is not installed. what: the setting that needs it."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackageError("bitsandbytes", what, "quant")


def pack_linears(
    llm: Any,
    config: QuantizationConfig,
    compute_dtype: torch.dtype,
    device: torch.device,
    what: str,
    *,
    rounds_inputs: bool = False,
) -> int:
    """Replace the linear layers of the decoder blocks, one after the other; embedding and head stay as they are.

    Args:
        compute_dtype: what 4-bit weights are unpacked to.
        device: where the layers go; weights are rounded there.
        what: the setting that asks for it, for messages.
        rounds_inputs: multiply in 8 bits, as LLM.int8 does: fast, but which inputs stay whole depends on all records of
            the batch, so it is nothing to train with.

    Returns:
        the number of layers replaced.
    """
    fitting, num_linears = _fitting(llm, config, device, what)
    for name, module in fitting.items():
        parent, _, leaf = name.rpartition(".")
        setattr(llm.get_submodule(parent), leaf, _packed(module, config, compute_dtype, rounds_inputs).to(device))
    _tell_the_rest(llm, what, len(fitting), num_linears)
    return len(fitting)


@torch.no_grad()
def round_linears(llm: Any, config: QuantizationConfig, device: torch.device) -> None:
    """Give the linear layers that `pack_linears` packs the values that the packed weights stand for, in their dtype.

    An adapter that was trained beside packed weights is merged into these.
    """
    for module in _fitting(llm, config, device, "model.llm.quantization")[0].values():
        weight: Any = module.weight
        weight.copy_(rounded(weight, config, device, is_transposed(module)))


def names_of_packed(llm: Any, config: QuantizationConfig, device: torch.device) -> list[str]:
    """The linear layers that `pack_linears` packs, by their names inside `llm`, which may be on the meta device."""
    return list(_fitting(llm, config, device, "model.llm.quantization")[0])


@torch.no_grad()
def rounded(weight: Tensor, config: QuantizationConfig, device: torch.device, is_transposed: bool = False) -> Tensor:
    """The values that a linear layer's weight has once it is packed, in its dtype and on its device.

    Args:
        weight: [out, in], or [in, out] where it is transposed.
        device: where it is rounded.

    Returns:
        of the same shape.
    """
    plain = (weight.T if is_transposed else weight).contiguous()
    linear = nn.Linear(plain.shape[1], plain.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(plain, requires_grad=False)
    values = unpacked(_packed(linear, config, weight.dtype).to(device)).to(weight.device, weight.dtype)
    return values.T if is_transposed else values


def unpacked(layer: Any) -> Tensor:
    """The weight [out, in] that a packed layer computes with."""
    import bitsandbytes.functional as functional

    weight = layer.weight
    if type(weight).__name__ == "Params4bit":
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    scales = weight.SCB if layer.state.SCB is None else layer.state.SCB
    return functional.int8_vectorwise_dequant(weight.data, scales)


def is_packed(parameter: Any) -> bool:
    """Whether a weight lies in 4 or 8 bits."""
    return type(parameter).__name__ in ("Params4bit", "Int8Params")


def keep_packed_whole(model: nn.Module) -> None:
    """Take packed weights out of the parameters, for engines that spread these over processes: a piece of packed bytes
    cannot be unpacked by itself, so each process keeps them all."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and is_packed(weight):
            del module._parameters["weight"]
            module.register_buffer("weight", weight, persistent=False)


def _fitting(llm: Any, config: QuantizationConfig, device: torch.device, what: str) -> tuple[dict[str, nn.Module], int]:
    """Name -> linear layer that can be packed; and how many linear layers there are."""
    require_bitsandbytes(what)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says on every start that a faster kernel is not there
    linears = find_linears(llm)
    return {name: module for name, module in linears.items() if _fits(module, config.bits, device)}, len(linears)


def _fits(module: nn.Module, bits: int, device: torch.device) -> bool:
    """bitsandbytes packs 4-bit weights for the CPU in such blocks, and fails on others; models in use have them.

    A subclass of nn.Linear may compute something else with its weight (BitNet), and is left alone.
    """
    inputs, outputs = linear_shape(module)
    is_plain = type(module) is nn.Linear or is_transposed(module)
    return is_plain and not (bits == 4 and device.type == "cpu" and (inputs % 64 or outputs % 32))


def _tell_the_rest(llm: Any, what: str, num_quantized: int, num_linears: int) -> None:
    """Say what keeps its precision, where that is more than norms and biases: a user asked for less memory."""
    blocks = find_blocks(llm).values()
    whole = sum(p.numel() for block in blocks for p in block.parameters() if p.is_floating_point() and p.dim() > 1)
    total = sum(math.prod(unpacked_shape(p)) for block in blocks for p in block.parameters() if p.dim() > 1)
    if num_quantized < num_linears or whole > total / 10:
        warn(
            f"{what}: {num_quantized} of {num_linears} linear layers of the blocks are quantized; "
            f"{whole / 1e6:.1f} M weights of the blocks stay as they are (experts in one tensor, convolutions, shapes "
            "that bitsandbytes does not pack)"
        )


def unpacked_shape(parameter: Any) -> tuple[int, ...]:
    """Of a weight [...] that may be packed."""
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


class _Product8bit(torch.autograd.Function):
    """inputs @ weight.T, with the weight unpacked in both passes and kept in neither."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: Any) -> Tensor:
        """inputs [..., in] -> [..., out]."""
        ctx.layer = layer
        return inputs @ unpacked(layer).to(inputs.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """[..., out] -> [..., in]."""
        return gradients[0] @ unpacked(ctx.layer).to(gradients[0].dtype), None


@cache
def _weights_8bit() -> type:
    import bitsandbytes as bnb

    class Linear8bitWeights(bnb.nn.Linear8bitLt):  # type: ignore[misc]
        """Computes with the inputs as they are, so that no record depends on another one."""

        def forward(self, inputs: Tensor) -> Tensor:
            """[..., in] -> [..., out]."""
            device = inputs.device.type
            if torch.is_autocast_enabled(device):
                inputs = inputs.to(torch.get_autocast_dtype(device))
            outputs: Tensor = _Product8bit.apply(inputs, self)
            return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    return Linear8bitWeights


def _packed(
    linear: Any, config: QuantizationConfig, compute_dtype: torch.dtype, rounds_inputs: bool = False
) -> nn.Module:
    import bitsandbytes as bnb

    shape, has_bias = linear_shape(linear), linear.bias is not None
    weight = linear.weight.data.T.contiguous() if is_transposed(linear) else linear.weight.data
    layer: Any
    if config.bits == 8:
        kind_8bit = _linear_8bit() if rounds_inputs else _weights_8bit()
        layer = kind_8bit(*shape, bias=has_bias, has_fp16_weights=False, threshold=6.0, device="meta")
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        kind: dict[str, Any] = {"quant_type": config.format, "compress_statistics": config.double}
        layer = bnb.nn.Linear4bit(*shape, bias=has_bias, compute_dtype=compute_dtype, device="meta", **kind)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, **kind)
        layer.weight.module = layer
    if has_bias:
        layer.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    return layer.requires_grad_(False).eval()
