"""config.json of a timm network, from which timm builds the same shape again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# where the weights were read from: another place than the folder that this is written into
_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "tag")
_LABELS = ("label_names", "label_descriptions", "label_offset")


def describe_timm(model: Any, path: str) -> dict[str, Any]:
    """What timm wrote of the network, or knows by its name, without source and labels.

    All settings stay: `fixed_input_size` alone decides whether a network is built at its own size or at its class's.

    Args:
        model: as `timm.create_model` made it.
        path: `model.vision.path`, whose config.json may bring arguments of the class (`model_args`).
    """
    settings = {k: v for k, v in model.pretrained_cfg.items() if k not in (*_SOURCES, *_LABELS) and v is not None}
    record = {"architecture": settings.pop("architecture"), "num_classes": 0}
    if arguments := _model_args(path):
        record["model_args"] = {**arguments, "num_classes": 0} if "num_classes" in arguments else arguments
    return {**record, "pretrained_cfg": {**settings, "num_classes": 0}}


def _model_args(path: str) -> dict[str, Any]:
    file = Path(path) / "config.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8")).get("model_args") or {}
    if ":" not in path and "/" not in path:
        return {}
    from timm.models import load_model_config_from_hf

    arguments: dict[str, Any] = load_model_config_from_hf(path.removeprefix("hf-hub:").removeprefix("hf_hub:"))[2]
    return arguments or {}
