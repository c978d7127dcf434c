"""The kinds of vision encoders, by `model.vision.backend`."""

from __future__ import annotations

from vlm.models.config import VisionConfig
from vlm.models.encoders.base import VisionBackend
from vlm.models.encoders.hf import Transformers
from vlm.models.encoders.open_clip import OpenClip
from vlm.models.encoders.timm import Timm

VISION_BACKENDS: dict[str, VisionBackend] = {"hf": Transformers(), "open_clip": OpenClip(), "timm": Timm()}


def encoder_weights(config: VisionConfig | None) -> dict[str, str]:
    """Where the weights of each encoder are read from, by the name that an export gives them: vision, and of further
    ones vision.fuse_with.0 and so on."""
    encoders = () if config is None else config.encoders
    names = ("vision", *(f"vision.fuse_with.{number}" for number in range(len(encoders))))
    return {name: VISION_BACKENDS[each.backend].weights_at(each) for name, each in zip(names, encoders, strict=False)}
