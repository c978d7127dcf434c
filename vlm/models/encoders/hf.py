"""Vision towers of transformers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.compat import quiet_progress
from vlm.errors import CheckpointError, ConfigError
from vlm.logs import warn
from vlm.models.config import EncoderConfig
from vlm.models.encoders.base import VisionBackend
from vlm.models.encoders.loading import CLIP, HALF, IMAGENET, Normalisation, check_class_token, load, wrap
from vlm.models.folder import config_json, encoder_type, misfit, why_no_weights
from vlm.models.hub import check_hub

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vlm.models.encoders.encoder import VisionEncoder

NO_PREPROCESSOR = (
    "the folder holds no preprocessor_config.json, so images are normalised as models of this type usually want. "
    "Usually the download is incomplete"
)
_STAGES = ("stage_names", "out_features", "out_indices")


@dataclass(frozen=True)
class TowerType:
    """One of transformers' model types."""

    class_name: str
    normalisation: Normalisation  # where no preprocessor_config.json says
    has_class_token: bool = True
    resamples: bool = False  # its position embeddings to any image size, unasked
    is_of_llava: bool = False  # transformers' LLaVA class was compared with it
    prefix: str = ""  # of its weights in a whole model's files, where transformers does not know it


TOWERS = {
    "clip_vision_model": TowerType("CLIPVisionModel", CLIP, is_of_llava=True),
    # SigLIP 2 at a fixed size too
    "siglip_vision_model": TowerType("SiglipVisionModel", HALF, has_class_token=False, is_of_llava=True),
    "blip_2_vision_model": TowerType("Blip2VisionModel", CLIP, prefix="vision_model."),  # EVA-CLIP-g
    "dinov2": TowerType("Dinov2Model", IMAGENET, resamples=True),
    "dinov2_with_registers": TowerType("Dinov2WithRegistersModel", IMAGENET, resamples=True),
    "dinov3_vit": TowerType("DINOv3ViTModel", IMAGENET, resamples=True),
}


class Transformers(VisionBackend):
    """`backend: hf`. The config.json of a folder says which class; a model of two towers gives its vision tower."""

    def build(self, config: EncoderConfig, dtype: torch.dtype, weights: bool) -> VisionEncoder:
        import transformers

        from vlm.models.encoders.towers import HFTower

        check_hub(config.path, "model.vision.path")
        # trust_remote_code is not offered for encoders: all known here are native
        settings: Any = load(
            lambda: transformers.AutoConfig.from_pretrained(config.path, trust_remote_code=False), config
        )
        settings = getattr(settings, "vision_config", settings)
        if reason := why_no_encoder(settings.model_type):
            raise ConfigError(f"model.vision.path {config.path}: {reason}")
        kind = TOWERS[settings.model_type]
        cls = getattr(transformers, kind.class_name)
        if weights:
            for note in self.notes(config):
                warn(f"model.vision.path {config.path}: {note}")
        model = _read_weights(config, cls, settings, dtype) if weights else cls(settings)
        num_prefix = kind.has_class_token + getattr(settings, "num_register_tokens", 0)
        check_class_token(config, num_prefix)
        interpolate = config.image_size not in (None, settings.image_size) and not kind.resamples
        tower = HFTower(model, num_prefix, config.layers, config.keep_class_token, interpolate)
        return wrap(tower, config, settings.image_size, *_normalisation(config, kind), num_prefix)

    def save_architecture(self, encoder: VisionEncoder, config: EncoderConfig, folder: Path) -> EncoderConfig:
        trunk = encoder.trunk
        _cut_config(trunk.model.config, len(trunk.blocks)).save_pretrained(folder)
        return config.model_copy(update={"path": folder.name, "layer": trunk.layer, "image_size": encoder.image_size})

    def why_not_llava(self, config: EncoderConfig, encoder: VisionEncoder) -> str | None:
        is_of_llava = TOWERS[encoder.trunk.model.config.model_type].is_of_llava
        return None if is_of_llava else super().why_not_llava(config, encoder)

    def problems(self, config: EncoderConfig, reads: Collection[str]) -> Iterator[str]:
        folder = Path(config.path)
        if not folder.exists():
            return
        if (problem := misfit(folder, is_encoder=True)) is not None:
            yield problem
            return
        if reason := why_no_encoder(encoder_type(config_json(folder))):
            yield f"{folder}: {reason}"
        if "weights" in reads and (reason := why_no_weights(folder)):
            yield f"{folder}: cannot load its weights: {reason}"

    def notes(self, config: EncoderConfig) -> Iterator[str]:
        if Path(config.path).is_dir() and not (Path(config.path) / "preprocessor_config.json").is_file():
            yield NO_PREPROCESSOR

    def is_here(self, config: EncoderConfig) -> bool:
        return True  # transformers' cache is looked into by name


def why_no_encoder(model_type: object) -> str | None:
    """Why a model type of transformers is of no vision encoder that can be loaded here."""
    if model_type in TOWERS:
        return None
    known = ", ".join(TOWERS)
    return f"model type {model_type!r} is no encoder known here; known: {known}. See docs/extending.md to add one"


def _cut_config(config: Any, num_blocks: int) -> Any:
    """A config of transformers for the first blocks only. Its stages are named anew: those of a backbone (DINOv2) count
    the blocks, and a list with one that is cut off is refused."""
    values = {key: value for key, value in config.to_dict().items() if key not in _STAGES}
    return type(config).from_dict({**values, "num_hidden_layers": num_blocks})


def _read_weights(config: EncoderConfig, cls: Any, settings: Any, dtype: torch.dtype) -> nn.Module:
    quiet_progress()
    if Path(config.path).is_dir() and (reason := why_no_weights(Path(config.path))):
        raise CheckpointError(f"model.vision.path {config.path}: cannot load its weights: {reason}")
    prefix = TOWERS[settings.model_type].prefix
    names = {"key_mapping": {f"^{prefix}": ""}} if prefix else {}
    model, report = load(
        lambda: cls.from_pretrained(
            config.path, config=settings, dtype=dtype, use_safetensors=True, output_loading_info=True, **names
        ),
        config,
    )
    if report["missing_keys"]:  # transformers would train on with random ones
        raise CheckpointError(
            f"model.vision.path {config.path}: its weights lack {len(report['missing_keys'])} of {cls.__name__}, "
            f"e.g. {min(report['missing_keys'])}. Usually the folder is a text model, or was saved incompletely"
        )
    return model


def _normalisation(config: EncoderConfig, kind: TowerType) -> tuple[Any, Any]:
    from transformers import ImageProcessingMixin

    mean, std = kind.normalisation
    try:
        settings = ImageProcessingMixin.get_image_processor_dict(config.path)[0]
    except OSError:  # no such file
        return mean, std
    return settings.get("image_mean") or mean, settings.get("image_std") or std
