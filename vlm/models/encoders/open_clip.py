"""Vision towers of open_clip."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.errors import ConfigError
from vlm.models.config import EncoderConfig
from vlm.models.encoders.base import VisionBackend
from vlm.models.encoders.loading import CLIP, check_name, load, without_weights, wrap
from vlm.models.encoders.timm import resize, timm_tower

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vlm.models.encoders.encoder import VisionEncoder

_CONFIG = "open_clip_config.json"


class OpenClip(VisionBackend):
    """`backend: open_clip`: a name that it knows, a folder, or a hub's `hf-hub:owner/name`."""

    def build(self, config: EncoderConfig, dtype: torch.dtype, weights: bool) -> VisionEncoder:
        import open_clip
        import torch

        name = f"local-dir:{Path(config.path).resolve()}" if Path(config.path).is_dir() else config.path
        preprocessing = _preprocessing(name, config, weights)
        with _quiet():
            model: Any = load(
                lambda: open_clip.create_model(
                    name,
                    pretrained=config.pretrained if weights else None,
                    load_weights=weights,
                    require_pretrained=weights,  # it would go on with random ones
                    pretrained_text=False,
                    device="cpu" if weights else torch.get_default_device(),
                    # of a network of timm, open_clip would scale the windows too
                    force_image_size=None if _wraps_timm(name) else config.image_size,
                ),
                config,
            )
        visual = model.visual
        tower, num_prefix = _tower(visual, config)
        size = visual.image_size
        mean = preprocessing.get("mean") or visual.image_mean or CLIP[0]
        std = preprocessing.get("std") or visual.image_std or CLIP[1]
        return wrap(tower, config, size[0] if isinstance(size, tuple | list) else size, mean, std, num_prefix)

    def save_architecture(self, encoder: VisionEncoder, config: EncoderConfig, folder: Path) -> EncoderConfig:
        file = Path(config.path) / _CONFIG
        if not file.is_file():
            return without_weights(config)  # a name that open_clip itself knows the shape of
        shutil.copy(file, folder)
        return without_weights(config, path=folder.name)


def _tower(visual: Any, config: EncoderConfig) -> tuple[nn.Module, int]:
    from vlm.models.encoders.towers import IntermediateTower

    if hasattr(visual, "trunk"):  # EVA-CLIP, SigLIP and others: open_clip wraps timm
        if config.image_size is not None:
            resize(visual.trunk, config.image_size)
        return timm_tower(visual.trunk, config)
    if hasattr(visual, "transformer"):
        num_blocks = len(visual.transformer.resblocks)
        return IntermediateTower(visual, config.layers, config.keep_class_token, num_blocks, is_open_clip=True), 1
    raise ConfigError(
        f"model.vision.path {config.path}: open_clip's own {type(visual).__name__} is not supported. timm has the "
        "same networks, e.g. {backend: timm, path: resnet50_clip.openai}"
    )


def _preprocessing(name: str, config: EncoderConfig, weights: bool) -> dict[str, Any]:
    """What open_clip knows of the weights that the config names, checked against the architecture. {} for files."""
    import open_clip

    if ":" in name:  # a folder or hub repository, which brings its own
        return {}
    check_name(name, open_clip.list_models(), "open_clip")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights and config.pretrained is None:
        raise ConfigError(
            f"model.vision.pretrained: open_clip's {name} needs a weight tag or file; tags: {', '.join(tags)}"
        )
    if config.pretrained is None or config.pretrained not in tags:
        return {}
    settings = open_clip.get_pretrained_cfg(name, config.pretrained)
    wanted = bool(settings.get("quick_gelu", False))
    if wanted != bool(open_clip.get_model_config(name).get("quick_gelu", False)):
        other = f"{name}-quickgelu" if wanted else name.removesuffix("-quickgelu")
        raise ConfigError(
            f"model.vision.path {name}: the weights {config.pretrained} were trained with another activation, so every "
            f"feature would be slightly wrong; set path: {other}"
        )
    return settings


def _wraps_timm(name: str) -> bool:
    """Whether open_clip's architecture of this name, or in this folder, is one of timm. False for one in a hub."""
    import open_clip

    if name.startswith("local-dir:"):
        file = Path(name.removeprefix("local-dir:")) / _CONFIG
        settings = json.loads(file.read_text(encoding="utf-8"))["model_cfg"] if file.is_file() else {}
    else:
        settings = {} if ":" in name else open_clip.get_model_config(name) or {}
    return "timm_model_name" in settings.get("vision_cfg", {})


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip warns on the root logger that a shape has no weights, which is the point of a shape."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
