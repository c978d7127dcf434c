"""Networks of the libraries as modules from pixels [N, 3, S, S] to patch features [N, P, C]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm.errors import ConfigError


class HFTower(nn.Module):
    """A vision model of transformers, cut after the block whose output is taken."""

    def __init__(self, model: Any, num_prefix: int, layer: int, keep_class: bool, interpolate: bool) -> None:
        super().__init__()
        self.model: Any = model
        del self.blocks[_blocks_to_run(len(self.blocks), layer) :]
        self.num_prefix = num_prefix
        self.keep_class = keep_class
        self.arguments = {"interpolate_pos_encoding": True} if interpolate else {}

    @property
    def blocks(self) -> nn.ModuleList:
        encoder = self.model.encoder
        return encoder.layers if hasattr(encoder, "layers") else encoder.layer

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, P, C], before the final norm."""
        outputs: list[Tensor] = []
        hook = self.blocks[-1].register_forward_hook(
            lambda _module, _inputs, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
        try:  # the hook sees the block's output before the final norm, which differs between model classes
            self.model(pixel_values, **self.arguments)
        finally:
            hook.remove()
        return _select_tokens(outputs[0], self.num_prefix, self.keep_class)


class IntermediateTower(nn.Module):
    """A ViT of timm or open_clip, cut after the block whose output is taken."""

    def __init__(self, model: Any, layer: int, keep_class: bool, num_blocks: int, is_open_clip: bool) -> None:
        super().__init__()
        self.model: Any = model
        self.index = _blocks_to_run(num_blocks, layer) - 1
        self.keep_class = keep_class
        self.is_open_clip = is_open_clip
        model.prune_intermediate_layers([self.index], prune_norm=True, prune_head=True)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, P, C]."""
        arguments: dict[str, Any] = {"indices": [self.index], "intermediates_only": True, "output_fmt": "NLC"}
        if self.is_open_clip:
            found = self.model.forward_intermediates(pixel_values, output_extra_tokens=self.keep_class, **arguments)
            patches, prefix = found["image_intermediates"][0], found.get("image_intermediates_prefix", [None])[0]
        else:
            found = self.model.forward_intermediates(pixel_values, return_prefix_tokens=self.keep_class, **arguments)
            patches, prefix = found[0] if self.keep_class else (found[0], None)
        return patches if prefix is None else torch.cat([prefix[:, :1], patches], dim=1)


class FeatureMapTower(nn.Module):
    """Any network of timm through `forward_features`, which ends in a map or in tokens."""

    def __init__(self, model: Any, keep_class: bool = False) -> None:
        super().__init__()
        self.model: Any = model
        self.num_prefix = getattr(model, "num_prefix_tokens", 0)
        self.keep_class = keep_class
        self.channels_last = str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")  # Swin

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, P, C], a map's cells row by row."""
        features = self.model.forward_features(pixel_values)
        if not isinstance(features, Tensor):  # CrossViT
            kind = type(self.model).__name__
            raise ConfigError(f"model.vision: {kind} ends in {len(features)} sets of tokens, and one is needed")
        if features.ndim == 4:
            return features.flatten(1, 2) if self.channels_last else features.flatten(2).transpose(1, 2)
        return _select_tokens(features, self.num_prefix, self.keep_class)


def _blocks_to_run(num_blocks: int, layer: int) -> int:
    """
    >>> _blocks_to_run(24, -2), _blocks_to_run(24, 23)
    (23, 24)
    """
    index = layer if layer >= 0 else num_blocks + layer
    if not 0 <= index < num_blocks:
        raise ConfigError(f"model.vision.layer {layer}: the encoder has {num_blocks} blocks")
    return index + 1


def _select_tokens(tokens: Tensor, num_prefix: int, keep_class_token: bool) -> Tensor:
    """Drop register tokens, and the class token unless it is kept. [N, prefix + P, C] -> [N, P (+ 1), C]."""
    patches = tokens[:, num_prefix:]
    return torch.cat([tokens[:, :1], patches], dim=1) if keep_class_token and num_prefix else patches
