"""Networks of the libraries as modules from pixels [N, 3, S, S] to patch features [N, P, C]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlm.errors import ConfigError


class HFTower(nn.Module):
    """A vision model of transformers, cut after the last block whose output is taken.

    Attributes:
        layers: the same blocks as they count from the cut on: -1 is the last that is left.
    """

    def __init__(self, model: Any, num_prefix: int, layers: Sequence[int], keep_class: bool, interpolate: bool) -> None:
        super().__init__()
        self.model: Any = model
        indices = _indices(len(self.blocks), layers)
        del self.blocks[max(indices) + 1 :]
        self.layers = tuple(index - len(self.blocks) for index in indices)
        self.layer = self.layers if len(self.layers) > 1 else self.layers[0]  # as a config writes it
        self.num_prefix = num_prefix
        self.keep_class = keep_class
        self.arguments = {"interpolate_pos_encoding": True} if interpolate else {}

    @property
    def blocks(self) -> nn.ModuleList:
        encoder = getattr(self.model, "encoder", None) or self.model.model  # DINOv3
        return encoder.layers if hasattr(encoder, "layers") else encoder.layer

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, P, C], before the final norm."""
        outputs: dict[Any, Tensor] = {}

        def keep(block: Any, _inputs: Any, output: Any) -> None:
            outputs[block] = output[0] if isinstance(output, tuple) else output

        taken = [self.blocks[layer] for layer in self.layers]
        hooks = [block.register_forward_hook(keep) for block in taken]
        try:  # the hook sees the block's output before the final norm, which differs between model classes
            self.model(pixel_values, **self.arguments)
        finally:
            for hook in hooks:
                hook.remove()
        return _join([_select_tokens(outputs[block], self.num_prefix, self.keep_class) for block in taken])


class IntermediateTower(nn.Module):
    """A ViT of timm or open_clip, cut after the last block whose output is taken.

    Attributes:
        layers: as those of `HFTower`.
    """

    def __init__(
        self, model: Any, layers: Sequence[int], keep_class: bool, num_blocks: int, is_open_clip: bool
    ) -> None:
        super().__init__()
        self.model: Any = model
        indices = _indices(num_blocks, layers)
        self.indices = sorted(set(indices))
        self.layers = tuple(index - max(indices) - 1 for index in indices)
        self.order = [self.indices.index(index) for index in indices]  # the libraries give them in the blocks' order
        self.keep_class = keep_class
        self.is_open_clip = is_open_clip
        model.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, P, C]."""
        arguments: dict[str, Any] = {"indices": self.indices, "intermediates_only": True, "output_fmt": "NLC"}
        if self.is_open_clip:
            given = self.model.forward_intermediates(pixel_values, output_extra_tokens=self.keep_class, **arguments)
            patches = given["image_intermediates"]
            found = list(zip(patches, given.get("image_intermediates_prefix", [None] * len(patches)), strict=True))
        else:
            given = self.model.forward_intermediates(pixel_values, return_prefix_tokens=self.keep_class, **arguments)
            found = given if self.keep_class else [(patches, None) for patches in given]
        return _join([_after_class_token(*found[number]) for number in self.order])


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


def _indices(num_blocks: int, layers: Sequence[int]) -> list[int]:
    """
    >>> _indices(24, [-2, 23])
    [22, 23]
    """
    for layer in layers:
        if not -num_blocks <= layer < num_blocks:
            raise ConfigError(f"model.vision.layer {layer}: the encoder has {num_blocks} blocks")
    return [layer % num_blocks for layer in layers]


def _join(features: Sequence[Tensor]) -> Tensor:
    """[N, P, C] each -> [N, P, sum of C]."""
    return features[0] if len(features) == 1 else torch.cat(list(features), dim=-1)


def _after_class_token(patches: Tensor, prefix: Tensor | None) -> Tensor:
    """[N, P, C] and the tokens before them, [N, prefix, C], of which the first is kept -> [N, P (+ 1), C]."""
    return patches if prefix is None else torch.cat([prefix[:, :1], patches], dim=1)


def _select_tokens(tokens: Tensor, num_prefix: int, keep_class_token: bool) -> Tensor:
    """Drop register tokens, and the class token unless it is kept. [N, prefix + P, C] -> [N, P (+ 1), C]."""
    patches = tokens[:, num_prefix:]
    return torch.cat([tokens[:, :1], patches], dim=1) if keep_class_token and num_prefix else patches
