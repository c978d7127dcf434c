"""The kinds of projectors, one section of the config and one line of `PROJECTORS` each. Imports torch late."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt, model_validator

from vlm.schema import KindSection, PathText

if TYPE_CHECKING:
    from torch import Tensor

    from vlm.models.projector import Projector


class ProjectorConfig(KindSection):
    """Base of the section `model.projector`, and what the program asks of a kind before one is built.

    What is answered here is right for linear layers after merged patches.
    """

    kind: str
    pool: PositiveInt = 1
    """Average squares of n x n patches first; 1 averages none."""
    unshuffle: PositiveInt = 1
    """Merge squares of n x n patches into one token before projecting; 1 keeps all patches."""
    normalize: bool = False
    """Standardise each vision channel with statistics of the first training images, kept with the weights."""
    initialize: Literal["random", "least_squares"] = "random"
    """least_squares: before the first step, fit the last layer so that the tokens of an image come near to the mean
    embedding of the words of its replies. For short captions; without effect where init_from brings a projector."""

    def build(self, *, num_patches: int, in_width: int, out_width: int, output_std: float) -> Projector:
        """P, C and D; `output_std` as `Projector` has it."""
        from vlm.models.projector import Projector

        return Projector(
            num_patches=num_patches, in_width=in_width, out_width=out_width, output_std=output_std, **self.merging
        )

    @property
    def merging(self) -> dict[str, Any]:
        """What every kind does with the patches first, as arguments of `Projector`."""
        return {"pool": self.pool, "unshuffle": self.unshuffle, "normalize": self.normalize}

    @property
    def patches_per_token(self) -> int:
        """How many of the encoder's patches are merged into one."""
        return (self.pool * self.unshuffle) ** 2

    @property
    def needs_square(self) -> bool:
        """Whether the patches must form a square grid, so that no class token may stand before them."""
        return self.patches_per_token > 1

    @property
    def start_path(self) -> str | None:
        """The file or folder whose weights it begins with: the key `pretrained` of a kind that has one."""
        return None

    def start_weights(self) -> Mapping[str, Tensor]:
        """The tensors [...] of `start_path` by the projector's names, read when they are asked for."""
        return {}

    def exported(self) -> ProjectorConfig:
        """What vlm.json says of it: an export holds all its weights."""
        return self

    def count_tokens(self, num_patches: int) -> int:
        """T, of an image of P patches."""
        return num_patches // self.patches_per_token

    def describe(self) -> str:
        """For people: "linear, 2 x 2 patches a token"."""
        side = self.pool * self.unshuffle
        return self.describe_layers() + (f", {side} x {side} patches a token" if side > 1 else "")

    def describe_layers(self) -> str:
        return self.kind

    def why_not_llava(self) -> str | None:
        """Why transformers' LLaVA class cannot hold it; None where it can."""
        if self.patches_per_token > 1:
            side = self.pool * self.unshuffle
            return f"its projector merges {side} x {side} patches"
        return None


class LinearProjectorConfig(ProjectorConfig):
    kind: Literal["linear"] = "linear"
    """One linear layer."""


class MLPProjectorConfig(ProjectorConfig):
    kind: Literal["mlp"] = "mlp"
    """Several linear layers."""
    depth: PositiveInt = 2
    """Number of linear layers, with gelu between them."""
    layer_norm: bool = False
    """A LayerNorm before the first of them (InternVL)."""

    def build(self, **sizes: Any) -> Projector:
        from vlm.models.projector import Projector

        return Projector(depth=self.depth, layer_norm=self.layer_norm, **sizes, **self.merging)

    def describe_layers(self) -> str:
        return f"{self.kind}, {self.depth} layers" + (" after a LayerNorm" if self.layer_norm else "")

    def why_not_llava(self) -> str | None:
        if self.layer_norm:
            return "its projector begins with a LayerNorm"
        layers = f"its projector has {self.depth} layers; one or two can be expressed"
        return super().why_not_llava() or (layers if self.depth > 2 else None)


class _FixedTokens(ProjectorConfig):
    """A kind that makes the same number of tokens of any number of patches."""

    num_tokens: PositiveInt = 64
    """Tokens of an image, any number."""

    def count_tokens(self, num_patches: int) -> int:
        return self.num_tokens

    def describe_layers(self) -> str:
        return f"{self.kind}, {self.num_tokens} tokens an image"

    def why_not_llava(self) -> str | None:
        return f"its projector is of kind {self.kind}"


class AverageProjectorConfig(_FixedTokens):
    kind: Literal["average"] = "average"
    """Averages over a coarser grid of num_tokens cells, then linear layers."""
    num_tokens: PositiveInt = 64
    """Tokens of an image, a square number; the patches must form a square grid too, no coarser."""
    depth: PositiveInt = 2
    """Number of linear layers, with gelu between them."""

    def build(self, **sizes: Any) -> Projector:
        from vlm.models.projector import AverageProjector

        return AverageProjector(num_tokens=self.num_tokens, depth=self.depth, **sizes, **self.merging)

    @property
    def needs_square(self) -> bool:
        return True


class ResamplerProjectorConfig(_FixedTokens):
    kind: Literal["resampler"] = "resampler"
    """A Perceiver resampler: num_tokens queries attend to the patches, then one linear layer."""
    num_blocks: PositiveInt = 2
    """Blocks of attention and MLP."""
    width: PositiveInt = 1024
    """Width of the queries."""
    num_heads: PositiveInt = 16
    """Heads of attention, which share the width."""

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> ResamplerProjectorConfig:
        _check_heads(self.width, self.num_heads)
        return self

    def build(self, **sizes: Any) -> Projector:
        from vlm.models.resampler import ResamplerProjector

        return ResamplerProjector(
            num_tokens=self.num_tokens, num_blocks=self.num_blocks, width=self.width, num_heads=self.num_heads,
            **sizes, **self.merging,
        )  # fmt: skip


class QFormerProjectorConfig(_FixedTokens):
    kind: Literal["qformer"] = "qformer"
    """BLIP-2's Q-Former, whose num_tokens queries read the patches in every second block; then one linear layer."""
    num_tokens: PositiveInt = 32
    """Queries, each a token of the image."""
    num_blocks: PositiveInt = 12
    """Blocks of the BERT; every second one reads the patches."""
    width: PositiveInt = 768
    """Width of the queries."""
    num_heads: PositiveInt = 12
    """Heads of attention, which share the width."""
    pretrained: PathText | None = None
    """The weights that it begins with, all but the linear layer's: a file of BLIP-2 (blip2_pretrained_flant5xxl.pth),
    or a folder or name of transformers' Blip2 classes. They belong to an encoder: EVA-CLIP-g, class token kept."""
    frozen: bool = False
    """Only the linear layer after it trains. Needs pretrained."""

    @model_validator(mode="after")
    def _starts_somewhere(self) -> QFormerProjectorConfig:
        _check_heads(self.width, self.num_heads)
        if self.frozen and self.pretrained is None:
            raise ValueError(
                "frozen: a Q-Former that never trains must begin with weights; name a BLIP-2 file in pretrained"
            )
        if self.initialize == "least_squares" and self.pretrained is None:
            raise ValueError(
                "initialize: least_squares fits the layer after the Q-Former, whose outputs say nothing of an image "
                "before it has trained; name a BLIP-2 file in pretrained, or set it to random"
            )
        return self

    def build(self, **sizes: Any) -> Projector:
        from vlm.models.qformer import QFormerProjector

        return QFormerProjector(
            num_tokens=self.num_tokens, num_blocks=self.num_blocks, width=self.width, num_heads=self.num_heads,
            frozen=self.frozen, **sizes, **self.merging,
        )  # fmt: skip

    @property
    def start_path(self) -> str | None:
        return self.pretrained

    def start_weights(self) -> Mapping[str, Tensor]:
        if self.pretrained is None:
            return {}
        from vlm.models.qformer import read_qformer

        return read_qformer(self.pretrained)

    def exported(self) -> ProjectorConfig:
        return self.model_copy(update={"pretrained": None, "frozen": False, "initialize": "random"})


def _check_heads(width: int, num_heads: int) -> None:
    if width % num_heads:
        raise ValueError(f"num_heads: {num_heads} heads cannot share a width of {width}; take a divisor of it")


PROJECTORS: dict[str, type[ProjectorConfig]] = {
    "linear": LinearProjectorConfig,
    "mlp": MLPProjectorConfig,
    "average": AverageProjectorConfig,
    "resampler": ResamplerProjectorConfig,
    "qformer": QFormerProjectorConfig,
}
