"""Networks of timm."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.errors import CheckpointError, ConfigError
from vlm.models.config import EncoderConfig
from vlm.models.encoders.base import VisionBackend
from vlm.models.encoders.loading import check_class_token, check_name, load, without_weights, wrap
from vlm.models.encoders.timm_folder import describe_timm

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vlm.models.encoders.encoder import VisionEncoder


class Timm(VisionBackend):
    """`backend: timm`: a name that it knows, a folder, or a hub's `hf-hub:owner/name`."""

    pickled = (".pth",)

    def build(self, config: EncoderConfig, dtype: torch.dtype, weights: bool) -> VisionEncoder:
        import timm

        from vlm.models.encoders.eva_pth import check_loaded, load_eva

        folder = Path(config.path)
        if folder.is_dir() and weights and not list(folder.glob("*.safetensors")):
            raise CheckpointError(f"model.vision.path {folder}: no .safetensors in it, and other weights are not read")
        name = f"local-dir:{folder.resolve()}" if folder.is_dir() else config.path
        if ":" not in name and "/" not in name:
            check_name(name.partition(".")[0], timm.list_models(), "timm")
        arguments: dict[str, Any] = {"pretrained": weights, "num_classes": 0}
        file = config.pretrained if weights else None
        is_eva = file is not None and file.endswith(".pth") and name.startswith("eva_")
        if file is not None and not is_eva:
            if not file.endswith(".safetensors"):
                raise ConfigError(
                    f"model.vision.pretrained {file}: timm weights are read from .safetensors files only; those of EVA "
                    "itself (path: eva_giant_patch14_224) from its .pth too"
                )
            arguments["pretrained_cfg_overlay"] = {"file": file}
        if is_eva:
            arguments["pretrained"] = False
        model: Any = load(lambda: timm.create_model(name, **arguments), config)
        missing = load_eva(model, str(file)) if is_eva else set[str]()
        settings = model.pretrained_cfg
        size = settings["input_size"][-1]
        if config.image_size is not None and config.image_size != size:
            resize(model, config.image_size)
        tower, num_prefix = timm_tower(model, config)
        check_loaded(model, missing, str(file))
        return wrap(tower, config, size, settings["mean"], settings["std"], num_prefix)

    def save_architecture(self, encoder: VisionEncoder, config: EncoderConfig, folder: Path) -> EncoderConfig:
        record = describe_timm(encoder.trunk.model, config.path)
        (folder / "config.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        return without_weights(config, path=folder.name)


def timm_tower(model: Any, config: EncoderConfig) -> tuple[nn.Module, int]:
    """A network as a module that yields patch features, and how many tokens it has before its patches.

    Raises:
        ConfigError: it has not the class token or the layer that the config asks for.
    """
    from vlm.models.encoders.towers import FeatureMapTower, IntermediateTower

    check_class_token(config, int(getattr(model, "cls_token", None) is not None))
    intermediates = getattr(model, "forward_intermediates", None)
    if intermediates is not None and "return_prefix_tokens" in inspect.signature(intermediates).parameters:
        num_blocks = len(model.blocks)
        tower = IntermediateTower(model, config.layers, config.keep_class_token, num_blocks, is_open_clip=False)
        return tower, getattr(model, "num_prefix_tokens", 1)
    if config.layers != (-1,):
        raise ConfigError(f"model.vision.layer {config.layer}: {config.path} has no row of token blocks, only layer -1")
    return FeatureMapTower(model, config.keep_class_token), getattr(model, "num_prefix_tokens", 0)


def resize(model: Any, size: int) -> None:
    """Let a network of timm take another image size; a CNN takes any."""
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=(size, size), **_own_windows(model))


def _own_windows(model: Any) -> dict[str, Any]:
    """Arguments of timm's `set_input_size` that keep a network's windows, which would else grow with the image.

    The table of a window's relative positions was trained for that window (Swin, MaxViT).
    """
    parameters = inspect.signature(model.set_input_size).parameters
    if "grid_size" in parameters:  # MaxViT; None without windows (CoAtNet)
        size = next((module.partition_size for module in model.modules() if hasattr(module, "partition_size")), None)
        return {"window_size": size, "grid_size": size}
    if "window_size" not in parameters:
        return {}
    stages = getattr(model, "layers", None) or model.stages
    # the windows asked for, of which a small last stage may have had no room
    sizes = getattr(model, "_ref_window_sizes", None) or [stage.blocks[0].window_size for stage in stages]
    return {"window_size": sizes[0] if len(set(sizes)) == 1 else sizes}
