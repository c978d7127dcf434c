"""Which library an encoder is of, and which of its blocks is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from vlm.compat import prepare
from vlm.errors import ConfigError
from vlm.models.config import EncoderConfig, VisionConfig
from vlm.models.encoders.hf import why_no_encoder
from vlm.models.folder import encoder_type
from vlm.models.tokenizer_files import read_json
from vlm.models.vision import VisionEncoder, build_vision

Backend = Literal["hf", "open_clip", "timm"]
_OPEN_CLIP = "open_clip_config.json"
_HUB = "hf-hub:"


def draft_encoder(path: str, backend: Backend | None = None, pretrained: str | None = None) -> EncoderConfig:
    """What `model.vision` says of an encoder: its library, and the last block but one where it has a row of blocks.

    Args:
        path: a folder, or a name that the library resolves.
        backend: the library; None finds it.
        pretrained: open_clip's weight tag or file, timm's file.

    Raises:
        ConfigError: no library is known for it, or its weights are not named. Usually the path is misspelt.
        CheckpointError: the library cannot build it.
    """
    config = EncoderConfig(backend=backend or find_backend(path), path=path, pretrained=pretrained)
    if config.backend == "open_clip" and pretrained is None:
        _refuse_without_tag(path)
    last_but_one = config.model_copy(update={"layer": -2})
    try:
        encoder_shape(last_but_one)
    except ConfigError:  # a network without a row of blocks, or something that is wrong with it
        encoder_shape(config)
        return config
    return last_but_one


def encoder_shape(config: EncoderConfig) -> VisionEncoder:
    """The encoder on the meta device: its sizes without weights."""
    with torch.device("meta"):
        return build_vision(VisionConfig.model_validate(config.model_dump()), weights=False)


def find_backend(path: str) -> Backend:
    """The library that knows a folder or a name.

    Raises:
        ConfigError: a name in a hub that may be of two libraries.

    >>> find_backend("openai/clip-vit-large-patch14-336")
    'hf'
    """
    if Path(path).is_dir():
        return _backend_of_folder(Path(path))
    if path.startswith(_HUB):
        if path.removeprefix(_HUB).startswith("timm/"):
            return "timm"
        raise ConfigError(f"{path}: timm and open_clip both read such names; add --backend timm or --backend open_clip")
    if "/" in path:
        return "hf"
    prepare()
    import timm

    if path.partition(".")[0] in timm.list_models():
        return "timm"
    import open_clip

    return "open_clip" if path in open_clip.list_models() else "hf"


def _backend_of_folder(folder: Path) -> Backend:
    settings = read_json(folder / "config.json")
    if why_no_encoder(encoder_type(settings)) is None:
        return "hf"
    if (folder / _OPEN_CLIP).is_file():
        return "open_clip"
    return "timm" if "architecture" in settings else "hf"


def _refuse_without_tag(path: str) -> None:
    """Raises ConfigError where open_clip knows the network by name and not which weights to load into it."""
    if ":" in path or Path(path).is_dir():
        return
    import open_clip

    tags = ", ".join(open_clip.list_pretrained_tags_by_model(path))
    raise ConfigError(f"open_clip's {path} needs a weight tag or file: add --pretrained TAG; tags: {tags}")
