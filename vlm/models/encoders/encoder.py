"""What every kind of vision encoder is built into: pixels [N, 3, S, S] -> patch features [N, P, C]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlm.models.config import VisionConfig
from vlm.models.vision_compute import EncoderCompute, choose_compute, is_convolutional, read_compute


class VisionEncoder(nn.Module):
    """A trunk and what its input looks like.

    While no weight of it trains, it stays in eval mode and runs without a gradient.

    Attributes:
        image_size: S, pixels per side.
        num_patches: P, tokens it yields per image, a kept class token included.
        width: C.
        num_hidden_tokens: what its blocks compute with beside those (class token, registers); for the memory estimate.
        mean, std: per RGB channel, of values in [0, 1].
        members: the encoders, where several are fused (`vlm.models.encoders.fused`), around the same weights; else this
            one. Pixels have three channels for each.
    """

    def __init__(
        self,
        trunk: nn.Module,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        num_hidden_tokens: int = 0,
        members: Sequence[VisionEncoder] = (),
    ) -> None:
        super().__init__()
        self.trunk: Any = trunk  # its class is the library's
        self.compute: EncoderCompute | None = None  # while frozen; None: as the weights and the autocast around say
        self.image_size = image_size
        self.num_hidden_tokens = num_hidden_tokens
        self.mean = _rgb(mean)
        self.std = _rgb(std)
        self._members = tuple(members)  # of a tuple, torch registers no weights a second time
        self.eval()
        with torch.no_grad():
            probe = trunk(self.blank_image())
        self.num_patches, self.width = probe.shape[1:]

    @property
    def members(self) -> tuple[VisionEncoder, ...]:
        return self._members or (self,)

    @property
    def joins(self) -> tuple[Any, ...]:
        """What its features are made of that its weights do not show: several layers or encoders, and in which order;
        () for one layer."""
        layers = getattr(self.trunk, "layers", ())
        return getattr(self.trunk, "joins", ()) or (tuple(layers) if len(layers) > 1 else ())

    @property
    def is_convolutional(self) -> bool:
        """Whether its network is, or one of several."""
        return any(is_convolutional(each.trunk) for each in self.members)

    @property
    def is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.trunk.parameters())

    def train(self, mode: bool = True) -> VisionEncoder:
        """Dropout and batch statistics wake up only in an encoder that trains."""
        return super().train(mode and not self.is_frozen)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, S, S], any float dtype -> [N, P, C]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            if self.compute is not None and self.is_frozen:
                return self.compute.run(self.trunk, pixel_values)
            return self.trunk(pixel_values.to(next(self.trunk.parameters()).dtype))

    def choose(self, config: VisionConfig, dtype: torch.dtype, device: torch.device) -> EncoderCompute | None:
        """How it should compute while it is frozen; None: as the rest of the model.

        Args:
            dtype: what the rest of the model computes in.
            device: where it will run.
        """
        if config.compute != "auto":
            return read_compute(config.compute)
        if not self.is_convolutional:
            return None
        return choose_compute(self.trunk, self.image_size, dtype, device, channels=3 * len(self.members))

    def settle(self, compute: EncoderCompute | None) -> None:
        """Compute so from now on, with the weights in that number format."""
        self.compute = compute
        if compute is not None:
            self.trunk.to(compute.dtype)

    def unused_parameters(self) -> list[str]:
        """Names of trained weights that no feature depends on, such as a pooling head's. Found by one backward."""
        named = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        with torch.enable_grad():
            features = self.trunk(self.blank_image())
        gradients = torch.autograd.grad(features.sum(), [parameter for _, parameter in named], allow_unused=True)
        return [name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is None]

    def blank_image(self) -> Tensor:
        """Zeros [1, 3, S, S] in the trunk's dtype; of several encoders three channels for each."""
        like = next(self.trunk.parameters())
        size, channels = self.image_size, 3 * len(self.members)
        return torch.zeros(1, channels, size, size, dtype=like.dtype, device=like.device)


def _rgb(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue
