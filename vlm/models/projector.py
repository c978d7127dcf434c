"""Projectors: vision features [N, P, C] -> tokens of the language model's width [N, T, D]."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from vlm.errors import ConfigError

_GELU_VARIANCE = 0.425  # of gelu(x) about 0 for x ~ N(0, 1); keeps the output's size right behind an activation


class Projector(nn.Module):
    """Average squares of patches, standardise, unshuffle, each if asked; then linear layers with gelu between them.

    Args:
        num_patches: P, what the encoder yields.
        in_width: C.
        out_width: D.
        depth: linear layers; 1 is a plain linear projector.
        pool: side of the square of patches that is averaged first.
        unshuffle: side of the square of (averaged) patches that becomes one token.
        layer_norm: a LayerNorm before the first linear layer.
        normalize: keep per-channel statistics and standardise with them; see `calibrate`.
        output_std: standard deviation that the output starts with, for inputs of unit variance. Take that of the token
            embeddings as the decoder reads them, so that images neither outweigh words nor vanish among them.
        layers_width: what the linear layers read, of a class that puts something between; None for the merged patches.

    Attributes:
        num_tokens: T.
        merged_width: channels of a merged patch.
        frozen: names of its weights that stay as they are where the projector trains.

    Raises:
        ConfigError: the patches do not form a square that `pool` times `unshuffle` divides.
    """

    feature_mean: Tensor  # [C], with `normalize`
    feature_std: Tensor

    def __init__(
        self,
        *,
        num_patches: int,
        in_width: int,
        out_width: int,
        depth: int = 1,
        pool: int = 1,
        unshuffle: int = 1,
        layer_norm: bool = False,
        normalize: bool = False,
        output_std: float = 1.0,
        layers_width: int | None = None,
    ) -> None:
        super().__init__()
        grid = math.isqrt(num_patches)
        side = pool * unshuffle
        if side > 1 and (grid * grid != num_patches or grid % side):
            keys = {"pool": pool, "unshuffle": unshuffle}
            asked = " x ".join(f"model.projector.{key} {value}" for key, value in keys.items() if value > 1)
            raise ConfigError(
                f"{asked}: the encoder yields {num_patches} patches, which must form a square grid whose side is a "
                f"multiple of {side}. Change model.vision.image_size, pool or unshuffle"
            )
        self.pool = pool
        self.unshuffle = unshuffle
        self.num_tokens = num_patches // side**2
        self.in_width = in_width
        self.merged_width = in_width * unshuffle**2
        self.frozen: frozenset[str] = frozenset()
        width = self.merged_width if layers_width is None else layers_width
        layers: list[nn.Module] = [*([nn.LayerNorm(width)] if layer_norm else []), nn.Linear(width, out_width)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(out_width, out_width)]
        self.layers = nn.Sequential(*layers)
        linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
        for number, linear in enumerate(linears):  # every one gives unit variance, the last one output_std
            input_variance = 1.0 if number == 0 else _GELU_VARIANCE
            gain = output_std if linear is linears[-1] else 1.0
            nn.init.normal_(linear.weight, std=gain / math.sqrt(input_variance * linear.in_features))
            nn.init.zeros_(linear.bias)
        self.normalize = normalize
        if normalize:
            self.register_buffer("feature_mean", torch.zeros(in_width))
            self.register_buffer("feature_std", torch.ones(in_width))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def pretrained_names(self) -> frozenset[str]:
        """Of the weights that `pretrained` of the config brings; no kind of linear layers alone has any."""
        return frozenset()

    @torch.no_grad()
    def calibrate(self, features: Tensor) -> None:
        """Take each channel's mean and standard deviation from features [N, P, C] of training images, averaged."""
        flat = pool_patches(features.float(), self.pool).flatten(0, 1)
        std, mean = torch.std_mean(flat, dim=0)
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std.clamp_min(1e-3 * std.mean().clamp_min(1e-6)))  # a dead channel stays small

    def forward(self, features: Tensor) -> Tensor:
        """[N, P, C], any float dtype -> [N, T, D]."""
        return self.layers(self.inputs(features))

    def inputs(self, features: Tensor) -> Tensor:
        """[N, P, C], any float dtype -> what `layers` read, here [N, T, C * unshuffle**2]."""
        features = pool_patches(features, self.pool)
        if self.normalize:
            features = (features.float() - self.feature_mean) / self.feature_std
        return unshuffle_patches(features, self.unshuffle).to(self.dtype)


class AverageProjector(Projector):
    """Averages the merged patches to a square of `num_tokens` cells; arguments as `Projector`.

    Raises:
        ConfigError: `num_tokens` is not a square number, or more than the merged patches, which must form a square too.
    """

    def __init__(self, *, num_tokens: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.grid, self.cells = math.isqrt(self.num_tokens), math.isqrt(num_tokens)
        if self.grid**2 != self.num_tokens or self.cells**2 != num_tokens or self.cells > self.grid:
            raise ConfigError(
                f"model.projector.num_tokens {num_tokens}: kind average makes a square grid of the {self.num_tokens} "
                "patches smaller, so both must be square numbers, and num_tokens at most the patches. Take another "
                "number, or kind resampler, which makes any"
            )
        self.num_tokens = num_tokens

    def inputs(self, features: Tensor) -> Tensor:
        """[N, P, C], any float dtype -> [N, T, C * unshuffle**2]."""
        merged = super().inputs(features).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return adaptive_avg_pool2d(merged, self.cells).flatten(2).transpose(1, 2)


def pool_patches(features: Tensor, side: int) -> Tensor:
    """Average every `side` x `side` square of patches.

    Args:
        features: [N, P, C], P a square grid in row-major order.

    Returns:
        [N, P / side**2, C].

    >>> pool_patches(torch.tensor([[[1.0], [2.0], [3.0], [6.0]]]), 2).tolist()
    [[[3.0]]]
    """
    if side == 1:
        return features
    num_images, num_patches, channels = features.shape
    grid = math.isqrt(num_patches)
    squares = features.reshape(num_images, grid // side, side, grid // side, side, channels)
    return squares.mean((2, 4)).flatten(1, 2)


def unshuffle_patches(features: Tensor, side: int) -> Tensor:
    """Merge every `side` x `side` square of patches into one token; channels run row by row over the square.

    Args:
        features: [N, P, C], P a square grid in row-major order.

    Returns:
        [N, P / side**2, C * side**2].
    """
    if side == 1:
        return features
    num_images, num_patches, channels = features.shape
    grid = math.isqrt(num_patches)
    squares = features.reshape(num_images, grid // side, side, grid // side, side, channels)
    return squares.permute(0, 1, 3, 2, 4, 5).reshape(num_images, num_patches // side**2, channels * side**2)
