"""BLIP-2's Q-Former as a projector (Li et al. 2023, arXiv:2301.12597), and the layouts of its weights.

Letters in shapes: N images, P patches, C merged patch, T queries, W their width, D LLM width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm.compat import prepare
from vlm.models.projector import Projector
from vlm.models.pth_files import PICKLED, read_pth
from vlm.models.weight_adapter import AdaptedTensors, WeightAdapter, drop, rename
from vlm.models.weight_files import WeightFiles

KEY = "model.projector.pretrained"
_LAYER = "encoder.layer.{n}."
_OF_BERT = [  # transformers' class has a level of another name, and no embedding, head or MLP of text
    rename("qformer.layernorm.{leaf}", "Qformer.bert.embeddings.LayerNorm.{leaf}"),
    drop("Qformer.bert.embeddings.{*rest}"),
    drop("Qformer.bert." + _LAYER + "intermediate.{*rest}"),
    drop("Qformer.bert." + _LAYER + "output.{*rest}"),
    *(
        rename(f"qformer.{_LAYER}{name}.attention.{{*rest}}", f"Qformer.bert.{_LAYER}{name}.self.{{*rest}}")
        for name in ("attention", "crossattention")
    ),
    rename("qformer.{*rest}", "Qformer.bert.{*rest}"),
]
BLIP2_PTH = WeightAdapter(
    "BLIP-2's own checkpoints (LAVIS)",
    (
        rename("queries", "query_tokens"),
        rename("norm.{leaf}", "ln_vision.{leaf}"),
        *_OF_BERT,
        drop("{*others}"),  # the encoder, heads of the first stage, the projection to another language model
    ),
)
BLIP2_FOLDER = WeightAdapter(
    "transformers' Blip2 classes",
    (
        rename("queries", "query_tokens"),
        rename("norm.{leaf}", "vision_model.post_layernorm.{leaf}"),
        drop("qformer." + _LAYER + "intermediate.{*rest}"),
        drop("qformer." + _LAYER + "output.{*rest}"),
        drop("qformer.embeddings.{*rest}"),
        rename("qformer.{*rest}", "qformer.{*rest}"),
        drop("{*others}"),
    ),
)


class QFormerProjector(Projector):
    """A LayerNorm, queries through transformers' `Blip2QFormerModel`, and one linear layer.

    Args:
        num_tokens: T.
        width: W, which `num_heads` divides.
        frozen: only the linear layer trains.
        settings: as for `Projector`.
    """

    def __init__(
        self, *, num_tokens: int, num_blocks: int, width: int, num_heads: int, frozen: bool = False, **settings: Any
    ) -> None:
        prepare()
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        super().__init__(layers_width=width, **settings)
        self.num_tokens = num_tokens
        self.norm = nn.LayerNorm(self.merged_width)  # BLIP-2's ln_vision
        self.queries = nn.Parameter(torch.randn(1, num_tokens, width) * 0.02)
        # without dropout: what trains here is compared with itself
        config = Blip2QFormerConfig(
            hidden_size=width, num_hidden_layers=num_blocks, num_attention_heads=num_heads, intermediate_size=4 * width,
            encoder_hidden_size=self.merged_width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.qformer: Any = Blip2QFormerModel(config)
        if frozen:
            self.frozen = self.pretrained_names()

    def pretrained_names(self) -> frozenset[str]:
        """Of all weights but the linear layer's and the statistics."""
        return frozenset(name for name, _ in self.named_parameters() if not name.startswith("layers."))

    def inputs(self, features: Tensor) -> Tensor:
        """[N, P, C], any float dtype -> [N, T, W], what the linear layer reads."""
        patches = self.norm(super().inputs(features))
        queries = self.queries.expand(len(patches), -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state


def read_qformer(path: str) -> AdaptedTensors:
    """Tensors [...] of a Q-Former, its queries and the norm before it, by the names in `QFormerProjector`.

    Args:
        path: a file of BLIP-2's own layout (.pth), or what transformers' Blip2 classes wrote (a folder or a name).

    Raises:
        CheckpointError: not there, not readable, or of another kind of model.
    """
    if Path(path).suffix in PICKLED:
        return BLIP2_PTH.to_ours(read_pth(Path(path), KEY))
    return BLIP2_FOLDER.to_ours(WeightFiles(path, KEY))
