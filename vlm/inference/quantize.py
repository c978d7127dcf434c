"""8- and 4-bit weights for talking: the language model's linear layers, after adapters were merged into them.

Quantizing first and merging then would round twice; here the sum is rounded once. An adapter that was trained beside
quantized weights (`model.llm.quantization`) is merged into what they stand for.
"""

from __future__ import annotations

from typing import Any

import torch

from vlm.errors import ConfigError
from vlm.models.config import QuantizationConfig
from vlm.models.quantize import pack_linears, require_bitsandbytes

FORMATS = {4: QuantizationConfig(format="nf4"), 8: QuantizationConfig(format="int8")}


def check_bits(bits: int | None, device: torch.device) -> None:
    """
    Raises:
        MissingPackageError: bitsandbytes is not installed.
        ConfigError: another number of bits, or a device that bitsandbytes does not compute on.
    """
    if bits is None:
        return
    if bits not in FORMATS:
        raise ConfigError(f"--bits {bits}: bitsandbytes stores weights in 4 or 8 bits; leave the flag out for all 16")
    require_bitsandbytes(f"--bits {bits}")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--bits {bits}: only on cuda and cpu, not on {device}. Leave --bits or --device out")


def quantize_linears(llm: Any, bits: int, compute_dtype: torch.dtype, device: torch.device) -> int:
    """Replace the linear layers of the decoder blocks by packed ones. Returns how many; see `pack_linears`."""
    return pack_linears(llm, FORMATS[bits], compute_dtype, device, f"--bits {bits}", rounds_inputs=True)
