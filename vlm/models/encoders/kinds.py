"""The kinds of vision encoders, by `model.vision.backend`."""

from __future__ import annotations

from vlm.models.encoders.base import VisionBackend
from vlm.models.encoders.hf import Transformers
from vlm.models.encoders.open_clip import OpenClip
from vlm.models.encoders.timm import Timm

VISION_BACKENDS: dict[str, VisionBackend] = {"hf": Transformers(), "open_clip": OpenClip(), "timm": Timm()}
