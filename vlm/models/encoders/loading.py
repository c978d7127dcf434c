"""What the backends share: names checked, libraries' errors told apart, a tower made an encoder."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, TypeVar

from vlm.errors import CheckpointError, ConfigError
from vlm.models.config import EncoderConfig

if TYPE_CHECKING:
    from torch import nn

    from vlm.models.encoders.encoder import VisionEncoder

Rgb = tuple[float, float, float]
Normalisation = tuple[Rgb, Rgb]  # mean and std of values in [0, 1]
CLIP: Normalisation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET: Normalisation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF: Normalisation = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
T = TypeVar("T")


def wrap(
    tower: nn.Module, config: EncoderConfig, own_size: int, mean: Sequence[float], std: Sequence[float], num_prefix: int
) -> VisionEncoder:
    """
    Args:
        own_size: pixels per side that the weights were trained for.
        num_prefix: tokens before the patches inside the network: class token and registers.

    Raises:
        ConfigError: it does not take the config's image size.
    """
    from vlm.models.encoders.encoder import VisionEncoder

    hidden = max(0, num_prefix - config.keep_class_token)
    try:
        return VisionEncoder(tower, config.image_size or own_size, mean, std, num_hidden_tokens=hidden)
    except (AssertionError, RuntimeError, ValueError) as error:
        if config.image_size in (None, own_size):
            raise
        raise ConfigError(
            f"model.vision.image_size {config.image_size}: {config.path} takes only {own_size} ({error})"
        ) from error


def check_class_token(config: EncoderConfig, num_prefix: int) -> None:
    """Raises ConfigError where a class token is to be kept and there is none."""
    if config.keep_class_token and num_prefix == 0:
        raise ConfigError(f"model.vision.keep_class_token: {config.path} has no class token; set it to false")


def check_name(name: str, known: Sequence[str], backend: str) -> None:
    """Raises ConfigError for a name that the library does not know, with those near to it."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ConfigError(f"model.vision.path {name}: neither a folder here nor a network that {backend} knows{hint}")


def load(read: Callable[[], T], config: EncoderConfig) -> T:
    """What `read` returns. Raises CheckpointError for the errors that libraries raise."""
    from safetensors import SafetensorError

    failures: tuple[type[Exception], ...] = (
        OSError, RuntimeError, ValueError, KeyError, SafetensorError, UnpicklingError,
    )  # fmt: skip
    try:
        return read()
    except failures as error:
        raise CheckpointError(
            f"model.vision: {config.backend} cannot load {config.path} ({type(error).__name__}: {str(error)[:300]}). "
            "Usually the path is misspelt, the weights are of another network or not safetensors, or the model hub "
            "cannot be reached"
        ) from error


def without_weights(config: EncoderConfig, **changes: Any) -> EncoderConfig:
    """The config of a shape whose weights lie elsewhere."""
    return config.model_copy(update={"pretrained": None, **changes})
