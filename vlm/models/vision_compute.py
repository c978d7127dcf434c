"""In which number and memory format a frozen encoder computes: what is fast for a language model may be slow for it.

A transformer is matrix products, like the language model, and computes as `train.precision` says. A convolutional
network can be faster in float32 where matrix products are faster in bfloat16, and with channels as the last dimension
in memory (EfficientNet-Lite0 on two AVX2 cores: 40 ms an image in fp32, 32 with channels last, 335 in bf16), so each
is timed once per machine.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlm.precision import DTYPES, autocast, compare, cpu_speed, remember

_FEWEST_CONVOLUTIONS = 3  # of a convolutional network; a vision transformer has one, which cuts the image into patches
_IMAGES_ON_GPU = 8  # per timed forward; on a CPU one


@dataclass(frozen=True)
class EncoderCompute:
    """A number format and a memory format. Weights stay contiguous, as fully_shard needs them: convolutions follow the
    images."""

    dtype: torch.dtype
    channels_last: bool = False

    @property
    def name(self) -> str:
        """As `model.vision.compute` writes it."""
        (number,) = [name for name, dtype in DTYPES.items() if dtype == self.dtype]
        return number + ("_channels_last" if self.channels_last else "")

    def run(self, trunk: nn.Module, pixel_values: Tensor) -> Tensor:
        """[N, 3, S, S], any float dtype -> what `trunk` yields, whose weights are in any float dtype."""
        pixels = pixel_values.to(next(trunk.parameters()).dtype)
        if self.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with autocast(pixels.device.type, self.dtype):
            return trunk(pixels)


def read_compute(name: str) -> EncoderCompute:
    """
    >>> read_compute("fp32_channels_last")
    EncoderCompute(dtype=torch.float32, channels_last=True)
    """
    number, _, layout = name.partition("_")
    return EncoderCompute(DTYPES[number], layout == "channels_last")


def is_convolutional(trunk: nn.Module) -> bool:
    return sum(isinstance(module, nn.Conv2d) for module in trunk.modules()) >= _FEWEST_CONVOLUTIONS


def choose_compute(
    trunk: nn.Module, image_size: int, dtype: torch.dtype, device: torch.device, channels: int = 3
) -> EncoderCompute:
    """The fastest format for a convolutional network on this device, timed once per machine and network.

    Args:
        trunk: with float32 weights, on the CPU; left as it was.
        image_size: S.
        channels: of the pixels; three for each encoder.
        dtype: what the rest of the model computes in; float32 leaves the memory format to choose alone.
    """
    candidates = [EncoderCompute(torch.float32, channels_last) for channels_last in (False, True)]
    if dtype != torch.float32 and (device.type == "cuda" or cpu_speed().is_bf16_fast):
        candidates += [EncoderCompute(dtype, channels_last) for channels_last in (False, True)]
    names = [candidate.name for candidate in candidates]
    shapes = hashlib.sha256(repr([(n, tuple(p.shape)) for n, p in trunk.named_parameters()]).encode()).hexdigest()
    what = f"encoder {shapes[:16]} at {image_size} on {device.type}, one of {', '.join(names)}"
    seconds: dict[str, float] = remember(what, lambda: _time(trunk, (channels, image_size), candidates, device))
    return read_compute(min(seconds, key=lambda name: seconds[name]))


@torch.no_grad()
def _time(
    trunk: nn.Module, shape: tuple[int, int], candidates: list[EncoderCompute], device: torch.device
) -> dict[str, float]:
    """Seconds of a forward by name of the format; `shape` is channels and pixels per side."""
    (channels, size), count = shape, 1 if device.type == "cpu" else _IMAGES_ON_GPU
    pixels = torch.zeros(count, channels, size, size, device=device)

    def forward(candidate: EncoderCompute) -> Any:
        candidate.run(trunk, pixels)  # autocast: the weights stay as they are
        if device.type == "cuda":
            torch.cuda.synchronize()

    trunk.to(device)
    seconds = compare([partial(forward, candidate) for candidate in candidates], budget=0.1)
    return {candidate.name: round(value, 6) for candidate, value in zip(candidates, seconds, strict=True)}
