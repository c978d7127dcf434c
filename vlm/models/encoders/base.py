"""What the program asks of a kind of vision encoder. `vlm.models.encoders.kinds` has the kinds by name.

Imported without torch: `vlm validate` asks too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.models.config import EncoderConfig

if TYPE_CHECKING:
    import torch

    from vlm.models.encoders.encoder import VisionEncoder


@dataclass(frozen=True)
class EncoderCost:
    """What the memory estimate needs to know of an encoder's blocks."""

    num_tokens: int  # that its blocks compute with: patches, class token, registers
    num_blocks: int
    block_width: int
    intermediate: int  # width inside a block's MLP
    activation_copies: int  # tensors of that width that autograd keeps: 1 after gelu, 2 after quick_gelu


class VisionBackend:
    """A kind of encoder: how one is built and written, and what is said of it. The first two methods must be given.

    Attributes:
        settings: names of files beside the weights that say what the network and its images are. A run that is resumed
            must not find them changed.
        pickled: endings of weight files beside .safetensors that it must not find changed either.
    """

    settings: tuple[str, ...] = ("config.json", "open_clip_config.json", "preprocessor_config.json")
    pickled: tuple[str, ...] = ()

    def build(self, config: EncoderConfig, dtype: torch.dtype, weights: bool) -> VisionEncoder:
        """The encoder that `config` names.

        Args:
            dtype: of the weights, if they are read in it; they are cast afterwards.
            weights: false builds the shape only, from what `save_architecture` wrote, and on the meta device too.

        Raises:
            ConfigError: unknown name, or an option the network does not have.
            CheckpointError: the weights are missing, or not of this network.
        """
        raise NotImplementedError

    def save_architecture(self, encoder: VisionEncoder, config: EncoderConfig, folder: Path) -> EncoderConfig:
        """Write what `build(..., weights=False)` needs to make the same shape again, without the original files.

        Args:
            folder: exists, and is this encoder's alone.

        Returns:
            the config that names it; a folder is named relative to `folder`'s parent.
        """
        raise NotImplementedError

    def cost(self, encoder: VisionEncoder) -> EncoderCost:
        """Found by looking: of a ViT its row of blocks, of a CNN one block of four times its last width."""
        width, intermediate, num_blocks = _find_blocks(encoder)
        is_quick = any("QuickGELU" in type(module).__name__ for module in encoder.modules())
        return EncoderCost(
            num_tokens=encoder.num_patches + encoder.num_hidden_tokens,
            num_blocks=num_blocks,
            block_width=width,
            intermediate=intermediate,
            activation_copies=2 if is_quick else 1,
        )

    def describe(self, config: EncoderConfig) -> str:
        """For the model card: the library whose network it is."""
        return config.backend

    def why_not_llava(self, config: EncoderConfig, encoder: VisionEncoder) -> str | None:
        """Why a whole export with it cannot have transformers' LLaVA layout; None if it can."""
        return f"its encoder ({config.backend}: {Path(config.path).name}) is no CLIP or SigLIP of transformers"

    def problems(self, config: EncoderConfig, reads: Collection[str]) -> Iterator[str]:
        """Why `config.path` would be refused, as far as files here say so without torch.

        Args:
            reads: holds "weights" if these will be read.
        """
        return iter(())

    def notes(self, config: EncoderConfig) -> Iterator[str]:
        """What loading it will warn of, for a path without problems."""
        return iter(())

    def weights_at(self, config: EncoderConfig) -> str:
        """File, folder or name that the weights are read from."""
        file = config.pretrained
        return file if file is not None and Path(file).is_file() else config.path

    def is_here(self, config: EncoderConfig) -> bool:
        """Whether `weights_at` can be looked into: not a name that another library resolves."""
        return Path(self.weights_at(config)).exists()


def _find_blocks(encoder: Any) -> tuple[int, int, int]:
    """(width, MLP width, number) of the longest row of blocks with linear layers."""
    from torch import nn

    groups = [module for module in encoder.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    rows = [group for group in groups if len(group) > 1 and len({type(block) for block in group}) == 1]
    rows = [group for group in rows if any(isinstance(module, nn.Linear) for module in group[0].modules())]
    if not rows:
        return encoder.width, 4 * encoder.width, 1
    blocks = max(rows, key=lambda group: sum(p.numel() for p in group.parameters()))
    linears = [module for module in blocks[0].modules() if isinstance(module, nn.Linear)]
    width = min(module.in_features for module in linears)
    return width, max(module.in_features for module in linears), len(blocks)
