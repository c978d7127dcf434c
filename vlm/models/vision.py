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
from vlm.models.encoders.kinds import VISION_BACKENDS
from vlm.models.hub import quiet_retries
from vlm.models.vision_compute import is_convolutional

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
    encoder = VISION_BACKENDS[config.backend].build(config, dtype, weights)
    return encoder if is_convolutional(encoder.trunk) else encoder.to(dtype)


def save_architecture(encoder: VisionEncoder, config: VisionConfig, folder: Path) -> VisionConfig:
    """Write what `build_vision(..., weights=False)` needs to make the same shape again, without the original files.

    Returns:
        the config that names it; a folder is named relative to `folder`'s parent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return VISION_BACKENDS[config.backend].save_architecture(encoder, config, folder)
