"""Vision encoders: pixels [N, 3, S, S] -> patch features [N, P, C].

One rule for all backends: `layer` counts block outputs, before any final norm. -1 is the last block, -2 the one before
(LLaVA's choice); both equal transformers' `hidden_states[layer]`. A network without a plain row of token blocks (a
CNN, Swin, a mixer) has only -1, which is timm's `forward_features`, its own final norm included; patches are in
row-major order.
"""

from __future__ import annotations

from pathlib import Path

import torch

from vlm.compat import prepare
from vlm.models.config import VisionConfig
from vlm.models.encoders.encoder import VisionEncoder
from vlm.models.encoders.fused import fuse
from vlm.models.encoders.kinds import VISION_BACKENDS
from vlm.models.hub import quiet_retries

__all__ = ["VisionEncoder", "build_vision", "save_architecture"]


def build_vision(config: VisionConfig, dtype: torch.dtype = torch.float32, *, weights: bool = True) -> VisionEncoder:
    """The encoder that `config` names, its weights in `dtype`; in float32 where `VisionEncoder.settle` may choose so.

    Args:
        weights: false builds the shape only, random; for the meta device.

    Raises:
        ConfigError: unknown name, or an option the network does not have.
        CheckpointError: the weights are missing, or not of this network.
    """
    prepare()
    quiet_retries()
    if config.compute != "auto":
        dtype = torch.float32
    built = []
    for each in config.encoders:
        encoder = VISION_BACKENDS[each.backend].build(each, dtype, weights)
        built.append(encoder if encoder.is_convolutional else encoder.to(dtype))
    return built[0] if len(built) == 1 else fuse(built, config)


def save_architecture(encoder: VisionEncoder, config: VisionConfig, folder: Path) -> VisionConfig:
    """Write what `build_vision(..., weights=False)` needs to make the same shape again, without the original files.

    Args:
        folder: of the only or first encoder; further ones are written beside it, with a number behind its name.

    Returns:
        the config that names it; a folder is named relative to `folder`'s parent.
    """
    named = []
    for number, (part, each) in enumerate(zip(encoder.members, config.encoders, strict=True)):
        place = folder if number == 0 else folder.with_name(f"{folder.name}-{number}")
        place.mkdir(parents=True, exist_ok=True)
        named.append(VISION_BACKENDS[each.backend].save_architecture(part, each, place))
    return config.with_encoders(named)
