"""A Perceiver resampler: learned queries attend to the patches, so that every image takes the same number of tokens.

After Flamingo (Alayrac et al. 2022, arXiv:2204.14198), where keys are the patches and the queries themselves.
Letters in shapes: N images, P patches, C merged patch, T queries, W their width, D LLM width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vlm.models.projector import Projector

_MLP = 4  # times the width
_QUERY_STD = 0.02


class ResamplerProjector(Projector):
    """Queries through `num_blocks` blocks of attention to the merged patches, a norm, and one linear layer.

    Args:
        num_tokens: T.
        width: W, which `num_heads` divides.
        settings: as for `Projector`.
    """

    def __init__(self, *, num_tokens: int, num_blocks: int, width: int, num_heads: int, **settings: Any) -> None:
        super().__init__(layers_width=width, **settings)
        self.num_tokens = num_tokens
        self.queries = nn.Parameter(torch.randn(1, num_tokens, width) * _QUERY_STD)
        self.patches = nn.Linear(self.merged_width, width)
        self.blocks = nn.ModuleList(ResamplerBlock(width, num_heads) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width)

    def inputs(self, features: Tensor) -> Tensor:
        """[N, P, C], any float dtype -> [N, T, W] of unit variance, what the linear layer reads."""
        patches = self.patches(super().inputs(features))
        queries = self.queries.expand(len(patches), -1, -1)
        for block in self.blocks:
            queries = block(queries, patches)
        return self.norm(queries)


class ResamplerBlock(nn.Module):
    """Attention of queries to patches and queries, then an MLP; norms first, both added to the queries."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_queries, self.norm_patches = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, _MLP * width), nn.GELU(), nn.Linear(_MLP * width, width)
        )

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        """[N, T, W], [N, P, W] -> [N, T, W]."""
        normed = self.norm_queries(queries)
        seen = torch.cat([self.norm_patches(patches), normed], dim=1)
        heads = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for states in (self.query(normed), self.key(seen), self.value(seen))
        )
        queries = queries + self.out(scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return queries + self.mlp(queries)
