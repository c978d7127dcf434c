"""Vision encoders: pixels [N, 3, S, S] -> patch features [N, P, C].

One rule for all backends: `layer` counts block outputs, before any final norm. -1 is the last block, -2 the one before
(LLaVA's choice); both equal transformers' `hidden_states[layer]`. A network without a plain row of token blocks (a
CNN, Swin, a mixer) has only -1, which is timm's `forward_features`, its own final norm included; patches are in
row-major order.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vlm.compat import prepare, quiet_progress
from vlm.errors import CheckpointError, ConfigError
from vlm.logs import warn
from vlm.models.config import VisionConfig
from vlm.models.folder import NO_PREPROCESSOR, lacks_preprocessor, why_no_encoder, why_no_weights
from vlm.models.hub import check_hub, quiet_retries
from vlm.models.timm_folder import describe_timm
from vlm.models.vision_compute import EncoderCompute, choose_compute, is_convolutional, read_compute

_STAGES = ("stage_names", "out_features", "out_indices")
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
# transformers' model types: the class of the vision tower, and mean and std where no preprocessor_config.json says
_HF_TOWERS = {
    "clip_vision_model": ("CLIPVisionModel", _CLIP),
    "siglip_vision_model": ("SiglipVisionModel", _HALF),  # SigLIP 2 at a fixed size too
    "dinov2": ("Dinov2Model", _IMAGENET),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", _IMAGENET),
}


class VisionEncoder(nn.Module):
    """A trunk and what its input looks like.

    While no weight of it trains, it stays in eval mode and runs without a gradient.

    Attributes:
        image_size: S, pixels per side.
        num_patches: P, tokens it yields per image, a kept class token included.
        width: C.
        mean, std: per RGB channel, of values in [0, 1].
    """

    def __init__(self, trunk: nn.Module, image_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.trunk: Any = trunk  # its class is the library's
        self.compute: EncoderCompute | None = None  # while frozen; None: as the weights and the autocast around say
        self.image_size = image_size
        self.mean = _rgb(mean)
        self.std = _rgb(std)
        self.eval()
        with torch.no_grad():
            probe = trunk(self._blank_image())
        self.num_patches, self.width = probe.shape[1:]

    @property
    def is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.trunk.parameters())

    def train(self, mode: bool = True) -> VisionEncoder:
        """Dropout and batch statistics wake up only in an encoder that trains."""
        return super().train(mode and not self.is_frozen)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, S, S], any float dtype -> [N, P, C]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            if self.compute is not None and self.is_frozen:
                return self.compute.run(self.trunk, pixel_values)
            return self.trunk(pixel_values.to(next(self.trunk.parameters()).dtype))

    def choose(self, config: VisionConfig, dtype: torch.dtype, device: torch.device) -> EncoderCompute | None:
        """How it should compute while it is frozen; None: as the rest of the model.

        Args:
            dtype: what the rest of the model computes in.
            device: where it will run.
        """
        if config.compute != "auto":
            return read_compute(config.compute)
        return choose_compute(self.trunk, self.image_size, dtype, device) if is_convolutional(self.trunk) else None

    def settle(self, compute: EncoderCompute | None) -> None:
        """Compute so from now on, with the weights in that number format."""
        self.compute = compute
        if compute is not None:
            self.trunk.to(compute.dtype)

    def unused_parameters(self) -> list[str]:
        """Names of trained weights that no feature depends on, such as a pooling head's. Found by one backward."""
        named = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        with torch.enable_grad():
            features = self.trunk(self._blank_image())
        gradients = torch.autograd.grad(features.sum(), [parameter for _, parameter in named], allow_unused=True)
        return [name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is None]

    def _blank_image(self) -> Tensor:
        """Zeros [1, 3, S, S] in the trunk's dtype."""
        like = next(self.trunk.parameters())
        return torch.zeros(1, 3, self.image_size, self.image_size, dtype=like.dtype, device=like.device)


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
    encoder = _BUILDERS[config.backend](config, dtype, weights)
    return encoder if is_convolutional(encoder.trunk) else encoder.to(dtype)


def save_architecture(encoder: VisionEncoder, config: VisionConfig, folder: Path) -> VisionConfig:
    """Write what `build_vision(..., weights=False)` needs to make the same shape again, without the original files.

    Returns:
        the config that names it; a folder is named relative to `folder`'s parent.
    """
    model: Any = encoder.trunk.model
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(encoder.trunk, HFTower):
        _cut_config(model.config, len(encoder.trunk.blocks)).save_pretrained(folder)
        return config.model_copy(update={"path": folder.name, "layer": -1, "image_size": encoder.image_size})
    if config.backend == "timm":
        record = describe_timm(model, config.path)
        (folder / "config.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        return config.model_copy(update={"path": folder.name, "pretrained": None})
    own = Path(config.path) / "open_clip_config.json"
    if own.is_file():
        shutil.copy(own, folder)
        return config.model_copy(update={"path": folder.name, "pretrained": None})
    return config.model_copy(update={"pretrained": None})  # a name that open_clip itself knows the shape of


def _cut_config(config: Any, num_blocks: int) -> Any:
    """A config of transformers for the first blocks only. Its stages are named anew: those of a backbone (DINOv2) count
    the blocks, and a list with one that is cut off is refused."""
    values = {key: value for key, value in config.to_dict().items() if key not in _STAGES}
    return type(config).from_dict({**values, "num_hidden_layers": num_blocks})


class HFTower(nn.Module):
    """A vision model of transformers, cut after the block whose output is taken."""

    def __init__(self, model: Any, num_prefix: int, layer: int, keep_class: bool, interpolate: bool) -> None:
        super().__init__()
        self.model: Any = model
        del self.blocks[_blocks_to_run(len(self.blocks), layer) :]
        self.num_prefix = num_prefix
        self.keep_class = keep_class
        self.arguments = {"interpolate_pos_encoding": True} if interpolate else {}

    @property
    def blocks(self) -> nn.ModuleList:
        encoder = self.model.encoder
        return encoder.layers if hasattr(encoder, "layers") else encoder.layer

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, P, C], before the final norm."""
        outputs: list[Tensor] = []
        hook = self.blocks[-1].register_forward_hook(
            lambda _module, _inputs, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
        try:  # the hook sees the block's output before the final norm, which differs between model classes
            self.model(pixel_values, **self.arguments)
        finally:
            hook.remove()
        return _select_tokens(outputs[0], self.num_prefix, self.keep_class)


class IntermediateTower(nn.Module):
    """A ViT of timm or open_clip, cut after the block whose output is taken."""

    def __init__(self, model: Any, layer: int, keep_class: bool, num_blocks: int, is_open_clip: bool) -> None:
        super().__init__()
        self.model: Any = model
        self.index = _blocks_to_run(num_blocks, layer) - 1
        self.keep_class = keep_class
        self.is_open_clip = is_open_clip
        model.prune_intermediate_layers([self.index], prune_norm=True, prune_head=True)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, P, C]."""
        arguments: dict[str, Any] = {"indices": [self.index], "intermediates_only": True, "output_fmt": "NLC"}
        if self.is_open_clip:
            found = self.model.forward_intermediates(pixel_values, output_extra_tokens=self.keep_class, **arguments)
            patches, prefix = found["image_intermediates"][0], found.get("image_intermediates_prefix", [None])[0]
        else:
            found = self.model.forward_intermediates(pixel_values, return_prefix_tokens=self.keep_class, **arguments)
            patches, prefix = found[0] if self.keep_class else (found[0], None)
        return patches if prefix is None else torch.cat([prefix[:, :1], patches], dim=1)


class FeatureMapTower(nn.Module):
    """Any network of timm through `forward_features`, which ends in a map or in tokens."""

    def __init__(self, model: Any, keep_class: bool = False) -> None:
        super().__init__()
        self.model: Any = model
        self.num_prefix = getattr(model, "num_prefix_tokens", 0)
        self.keep_class = keep_class
        self.channels_last = str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")  # Swin

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, P, C], a map's cells row by row."""
        features = self.model.forward_features(pixel_values)
        if not isinstance(features, Tensor):  # CrossViT
            kind = type(self.model).__name__
            raise ConfigError(f"model.vision: {kind} ends in {len(features)} sets of tokens, and one is needed")
        if features.ndim == 4:
            return features.flatten(1, 2) if self.channels_last else features.flatten(2).transpose(1, 2)
        return _select_tokens(features, self.num_prefix, self.keep_class)


def _build_hf(config: VisionConfig, dtype: torch.dtype, weights: bool) -> VisionEncoder:
    import transformers

    check_hub(config.path, "model.vision.path")
    # trust_remote_code is not offered for encoders: all known here are native
    settings = _load(lambda: transformers.AutoConfig.from_pretrained(config.path, trust_remote_code=False), config)
    settings = getattr(settings, "vision_config", settings)
    if reason := why_no_encoder(settings.model_type):
        raise ConfigError(f"model.vision.path {config.path}: {reason}")
    class_name, normalisation = _HF_TOWERS[settings.model_type]
    cls = getattr(transformers, class_name)
    model = _hf_weights(config, cls, settings, dtype) if weights else cls(settings)
    num_prefix = {"siglip_vision_model": 0, "dinov2_with_registers": 1 + getattr(settings, "num_register_tokens", 0)}
    tower = HFTower(
        model,
        _check_class_token(config, num_prefix.get(settings.model_type, 1)),
        config.layer,
        config.keep_class_token,
        # DINOv2 resamples by itself
        interpolate=config.image_size not in (None, settings.image_size) and "dinov2" not in settings.model_type,
    )
    return _encoder(tower, config, settings.image_size, *_hf_normalisation(config, normalisation))


def _hf_weights(config: VisionConfig, cls: Any, settings: Any, dtype: torch.dtype) -> nn.Module:
    quiet_progress()
    if Path(config.path).is_dir() and (reason := why_no_weights(Path(config.path))):
        raise CheckpointError(f"model.vision.path {config.path}: cannot load its weights: {reason}")
    if lacks_preprocessor(config.path):
        warn(f"model.vision.path {config.path}: {NO_PREPROCESSOR}")
    model, report = _load(
        lambda: cls.from_pretrained(
            config.path, config=settings, dtype=dtype, use_safetensors=True, output_loading_info=True
        ),
        config,
    )
    if report["missing_keys"]:  # transformers would train on with random ones
        raise CheckpointError(
            f"model.vision.path {config.path}: its weights lack {len(report['missing_keys'])} of {cls.__name__}, "
            f"e.g. {min(report['missing_keys'])}. Usually the folder is a text model, or was saved incompletely"
        )
    return model


def _hf_normalisation(config: VisionConfig, default: tuple[Any, Any]) -> tuple[Any, Any]:
    from transformers import ImageProcessingMixin

    try:
        settings = ImageProcessingMixin.get_image_processor_dict(config.path)[0]
    except OSError:  # no such file
        return default
    return settings.get("image_mean") or default[0], settings.get("image_std") or default[1]


def _build_open_clip(config: VisionConfig, dtype: torch.dtype, weights: bool) -> VisionEncoder:
    import open_clip

    name = f"local-dir:{Path(config.path).resolve()}" if Path(config.path).is_dir() else config.path
    preprocessing = _open_clip_preprocessing(name, config, weights)
    with _quiet():
        model = _load(
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
    if hasattr(visual, "trunk"):  # EVA-CLIP, SigLIP and others: open_clip wraps timm
        if config.image_size is not None:
            _resize(visual.trunk, config.image_size)
        tower: nn.Module = _timm_tower(visual.trunk, config)
    elif hasattr(visual, "transformer"):
        num_blocks = len(visual.transformer.resblocks)
        tower = IntermediateTower(visual, config.layer, config.keep_class_token, num_blocks, is_open_clip=True)
    else:
        raise ConfigError(
            f"model.vision.path {config.path}: open_clip's own {type(visual).__name__} is not supported. timm has the "
            "same networks, e.g. {backend: timm, path: resnet50_clip.openai}"
        )
    size = visual.image_size
    mean = preprocessing.get("mean") or visual.image_mean or _CLIP[0]
    std = preprocessing.get("std") or visual.image_std or _CLIP[1]
    return _encoder(tower, config, size[0] if isinstance(size, tuple | list) else size, mean, std)


def _open_clip_preprocessing(name: str, config: VisionConfig, weights: bool) -> dict[str, Any]:
    """What open_clip knows of the weights that the config names, checked against the architecture. {} for files."""
    import open_clip

    if ":" in name:  # a folder or hub repository, which brings its own
        return {}
    _check_name(name, open_clip.list_models(), "open_clip")
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


def _build_timm(config: VisionConfig, dtype: torch.dtype, weights: bool) -> VisionEncoder:
    import timm

    folder = Path(config.path)
    if folder.is_dir() and weights and not list(folder.glob("*.safetensors")):
        raise CheckpointError(f"model.vision.path {folder}: no .safetensors in it, and other weights are not read")
    name = f"local-dir:{folder.resolve()}" if folder.is_dir() else config.path
    if ":" not in name and "/" not in name:
        _check_name(name.partition(".")[0], timm.list_models(), "timm")
    arguments: dict[str, Any] = {"pretrained": weights, "num_classes": 0}
    file = config.pretrained
    if file is not None and weights:
        if not file.endswith(".safetensors"):
            raise ConfigError(f"model.vision.pretrained {file}: timm weights are read from .safetensors files only")
        arguments["pretrained_cfg_overlay"] = {"file": file}
    model = _load(lambda: timm.create_model(name, **arguments), config)
    settings = model.pretrained_cfg
    size = settings["input_size"][-1]
    if config.image_size is not None and config.image_size != size:
        _resize(model, config.image_size)
    return _encoder(_timm_tower(model, config), config, size, settings["mean"], settings["std"])


def _wraps_timm(name: str) -> bool:
    """Whether open_clip's architecture of this name, or in this folder, is one of timm. False for one in a hub."""
    import open_clip

    if name.startswith("local-dir:"):
        file = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))["model_cfg"] if file.is_file() else {}
    else:
        settings = {} if ":" in name else open_clip.get_model_config(name) or {}
    return "timm_model_name" in settings.get("vision_cfg", {})


def _resize(model: Any, size: int) -> None:
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


_BUILDERS = {"hf": _build_hf, "open_clip": _build_open_clip, "timm": _build_timm}


def _timm_tower(model: Any, config: VisionConfig) -> nn.Module:
    keep_class = _check_class_token(config, int(getattr(model, "cls_token", None) is not None)) > 0
    keep_class = keep_class and config.keep_class_token
    intermediates = getattr(model, "forward_intermediates", None)
    if intermediates is not None and "return_prefix_tokens" in inspect.signature(intermediates).parameters:
        return IntermediateTower(model, config.layer, keep_class, len(model.blocks), is_open_clip=False)
    if config.layer != -1:
        raise ConfigError(f"model.vision.layer {config.layer}: {config.path} has no row of token blocks, only layer -1")
    return FeatureMapTower(model, keep_class)


def _encoder(
    tower: nn.Module, config: VisionConfig, own_size: int, mean: Sequence[float], std: Sequence[float]
) -> VisionEncoder:
    try:
        return VisionEncoder(tower, config.image_size or own_size, mean, std)
    except (AssertionError, RuntimeError, ValueError) as error:
        if config.image_size in (None, own_size):
            raise
        raise ConfigError(
            f"model.vision.image_size {config.image_size}: {config.path} takes only {own_size} ({error})"
        ) from error


def _check_class_token(config: VisionConfig, num_prefix: int) -> int:
    if config.keep_class_token and num_prefix == 0:
        raise ConfigError(f"model.vision.keep_class_token: {config.path} has no class token; set it to false")
    return num_prefix


def _check_name(name: str, known: Sequence[str], backend: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ConfigError(f"model.vision.path {name}: neither a folder here nor a network that {backend} knows{hint}")


def _load(load: Any, config: VisionConfig) -> Any:
    try:
        return load()
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError, UnpicklingError) as error:
        raise CheckpointError(
            f"model.vision: {config.backend} cannot load {config.path} ({type(error).__name__}: {str(error)[:300]}). "
            "Usually the path is misspelt, the weights are of another network or not safetensors, or the model hub "
            "cannot be reached"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip warns on the root logger that a shape has no weights, which is the point of a shape."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _rgb(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def _blocks_to_run(num_blocks: int, layer: int) -> int:
    """
    >>> _blocks_to_run(24, -2), _blocks_to_run(24, 23)
    (23, 24)
    """
    index = layer if layer >= 0 else num_blocks + layer
    if not 0 <= index < num_blocks:
        raise ConfigError(f"model.vision.layer {layer}: the encoder has {num_blocks} blocks")
    return index + 1


def _select_tokens(tokens: Tensor, num_prefix: int, keep_class_token: bool) -> Tensor:
    """Drop register tokens, and the class token unless it is kept. [N, prefix + P, C] -> [N, P (+ 1), C]."""
    patches = tokens[:, num_prefix:]
    return torch.cat([tokens[:, :1], patches], dim=1) if keep_class_token and num_prefix else patches
