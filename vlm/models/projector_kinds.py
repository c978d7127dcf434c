"""The kinds of projectors, one section of the config and one line of `PROJECTORS` each. Imports torch late."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from vlm.schema import KindSection

if TYPE_CHECKING:
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
            num_patches=num_patches, in_width=in_width, out_width=out_width, output_std=output_std,
            depth=self.num_layers, pool=self.pool, unshuffle=self.unshuffle, normalize=self.normalize,
        )  # fmt: skip

    @property
    def num_layers(self) -> int:
        """Linear layers."""
        return 1

    @property
    def patches_per_token(self) -> int:
        """How many of the encoder's patches become one token."""
        return (self.pool * self.unshuffle) ** 2

    def count_tokens(self, num_patches: int) -> int:
        """T, of an image of P patches."""
        return num_patches // self.patches_per_token

    def widths(self, in_width: int, out_width: int) -> list[int]:
        """What the first linear layer reads, and what each writes; for the memory estimate."""
        return [in_width * self.unshuffle**2, *[out_width] * self.num_layers]

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
        layers = self.num_layers
        return f"its projector has {layers} layers; one or two can be expressed" if layers > 2 else None


class LinearProjectorConfig(ProjectorConfig):
    kind: Literal["linear"] = "linear"
    """One linear layer."""


class MLPProjectorConfig(ProjectorConfig):
    kind: Literal["mlp"] = "mlp"
    """Several linear layers."""
    depth: PositiveInt = 2
    """Number of linear layers, with gelu between them."""

    @property
    def num_layers(self) -> int:
        return self.depth

    def describe_layers(self) -> str:
        return f"{self.kind}, {self.depth} layers"


PROJECTORS: dict[str, type[ProjectorConfig]] = {"linear": LinearProjectorConfig, "mlp": MLPProjectorConfig}
