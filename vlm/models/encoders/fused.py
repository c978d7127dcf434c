"""Several encoders as one: each sees the image in its own way, and their features are joined.

Letters in shapes: N images, E encoders, S pixels per side of the largest of their images, P patches, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vlm.errors import ConfigError
from vlm.models.encoders.encoder import VisionEncoder

if TYPE_CHECKING:
    from vlm.models.config import VisionConfig


def fuse(encoders: Sequence[VisionEncoder], config: VisionConfig) -> VisionEncoder:
    """One encoder of several.

    Args:
        encoders: as `config.encoders` names them, in that order.

    Raises:
        ConfigError: their features cannot be joined as `config.fuse_by` says.
    """
    if reason := _why_not(encoders, config):
        raise ConfigError(f"model.vision.fuse_with: {reason}")
    first = encoders[0]
    return VisionEncoder(
        FusedTower(encoders, config.fuse_by),
        max(each.image_size for each in encoders),
        first.mean,
        first.std,
        members=encoders,
    )


class FusedTower(nn.Module):
    """The networks of several encoders, with what joins their features.

    Attributes:
        joins: what the weights do not show: how the features are joined, and of which layers each one's are.
    """

    def __init__(self, encoders: Sequence[VisionEncoder], by: str) -> None:
        super().__init__()
        self.towers = nn.ModuleList(each.trunk for each in encoders)
        self.sizes = [each.image_size for each in encoders]
        self.num_patches = encoders[0].num_patches
        self.by = by
        self.joins = (by, *(each.joins for each in encoders))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[N, 3 * E, S, S], an image smaller than S in the upper left corner -> [N, P, C]."""
        features = []
        for number, (tower, size) in enumerate(zip(self.towers, self.sizes, strict=True)):
            pixels = pixel_values[:, 3 * number : 3 * number + 3, :size, :size]
            features.append(tower(pixels.to(next(tower.parameters()).dtype)))
        if self.by == "token":
            return torch.cat(features, dim=1)
        return torch.cat([resize_grid(each, self.num_patches) for each in features], dim=-1)


def resize_grid(features: Tensor, num_patches: int) -> Tensor:
    """[N, P, C], a square grid row by row -> [N, num_patches, C], interpolated between the cells' middles.

    >>> resize_grid(torch.tensor([[[1.0], [2.0], [3.0], [6.0]]]), 1).tolist()
    [[[3.0]]]
    """
    if features.shape[1] == num_patches:
        return features
    before, after = math.isqrt(features.shape[1]), math.isqrt(num_patches)
    grid = features.transpose(1, 2).unflatten(2, (before, before)).float()
    resized = interpolate(grid, (after, after), mode="bilinear", align_corners=False, antialias=after < before)
    return resized.flatten(2).transpose(1, 2).to(features.dtype)


def _why_not(encoders: Sequence[VisionEncoder], config: VisionConfig) -> str | None:
    patches, widths = [each.num_patches for each in encoders], [each.width for each in encoders]
    if config.fuse_by == "token":
        if len(set(widths)) == 1:
            return None
        return f"the encoders' features are {widths} wide, and tokens of one width are needed. Set fuse_by: channel"
    if len(set(patches)) == 1:
        return None
    if any(math.isqrt(count) ** 2 != count for count in patches) or any(e.keep_class_token for e in config.encoders):
        return (
            f"the encoders yield {patches} patches, which can be brought to one number only where each forms a square "
            "grid without a class token. Change image_size or keep_class_token, or set fuse_by: token"
        )
    return None
